"""A backend of the kind that LocalAI's are, with nothing of localmesh but the generated stubs of backend.Backend.

It answers with what it was asked. The file `mode` beside it, words separated by spaces, makes it misbehave:
die_at_start, hang_health, hang_load, fail_load, ignore_sigterm, grandchild. Prompts: "crash" kills it in the middle,
"slow N" takes N seconds and cannot be cancelled, "error" fails.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc

from localmesh.thirdparty import backend_pb2 as pb
from localmesh.thirdparty import backend_pb2_grpc

HERE = Path(__file__).parent
MODE = (HERE / "mode").read_text().split() if (HERE / "mode").exists() else []
NEVER = threading.Event()


class Echo(backend_pb2_grpc.BackendServicer):
    def __init__(self) -> None:
        self.options = None

    def Health(self, request, context):
        if "hang_health" in MODE:
            NEVER.wait()
        return pb.Reply(message=b"OK")

    def LoadModel(self, request, context):
        if "hang_load" in MODE:
            print("reading the weights, slowly", file=sys.stderr, flush=True)
            NEVER.wait()
        if "fail_load" in MODE:
            return pb.Result(success=False, message="these are no weights")
        self.options = request
        return pb.Result(success=True)

    def Free(self, request, context):
        (HERE / "freed").touch()
        return pb.Result(success=True)

    def Predict(self, request, context):
        self._act(request.Prompt)
        text = request.Messages[-1].content if request.UseTokenizerTemplate else request.Prompt
        return pb.Reply(message=f"echo: {text}".encode(), tokens=2, prompt_tokens=len(text.split()))

    def PredictStream(self, request, context):
        text = request.Messages[-1].content if request.UseTokenizerTemplate else request.Prompt
        data = f"echo: {text}".encode()
        for place, byte in enumerate(data):  # one byte at a time: characters come in pieces
            if request.Prompt == "crash" and place == 4:
                self._act("crash")
            yield pb.Reply(message=bytes([byte]))
        self._act(request.Prompt)
        yield pb.Reply(tokens=7, prompt_tokens=len(text.split()))

    def Embedding(self, request, context):
        return pb.EmbeddingResult(embeddings=[float(len(request.Embeddings)), 1.0])

    def TokenizeString(self, request, context):
        return pb.TokenizationResponse(length=2, tokens=[ord(c) for c in request.Prompt])

    def Score(self, request, context):
        return pb.ScoreResponse(
            candidates=[pb.CandidateScore(log_prob=-float(len(c)), num_tokens=len(c)) for c in request.candidates]
        )

    def ModelMetadata(self, request, context):
        """Tell what LoadModel was given: for the tests to see."""
        return pb.ModelMetadataResponse(
            rendered_template=json.dumps({"options": self.options.SerializeToString().hex()})
        )

    def _act(self, prompt: str) -> None:
        if prompt == "crash":
            print("free(): invalid pointer", file=sys.stderr, flush=True)
            os.abort()
        if prompt == "error":
            raise RuntimeError("the model said no")
        if prompt.startswith("slow "):
            (HERE / "started").touch()
            time.sleep(float(prompt.split()[1]))


class Unheard(grpc.GenericRpcHandler):
    """Methods that are in no proto of localmesh's: bytes in, bytes out."""

    def service(self, details):
        if details.method == "/backend.Backend/TTS":
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"tts:" + request)
        if details.method == "/backend.Backend/AudioToAudioStream":
            return grpc.stream_stream_rpc_method_handler(lambda requests, context: (b"audio:" + r for r in requests))
        return None


class Authorised(grpc.ServerInterceptor):
    def __init__(self, token: str) -> None:
        self.header = ("authorization", f"Bearer {token}")

    def intercept_service(self, continuation, details):
        if self.header in [tuple(pair) for pair in details.invocation_metadata]:
            return continuation(details)

        def refuse(request, context):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")

        return grpc.unary_unary_rpc_method_handler(refuse)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--addr", required=True)
    address = parser.parse_args().addr
    if "die_at_start" in MODE:
        print("ImportError: libcudart.so.12: cannot open shared object file", file=sys.stderr, flush=True)
        sys.exit(3)
    if "ignore_sigterm" in MODE:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "grandchild" in MODE:
        sleeper = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
        (HERE / "grandchild").write_text(str(sleeper.pid))
    (HERE / "pid").write_text(str(os.getpid()))
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=int(os.environ.get("PYTHON_GRPC_MAX_WORKERS", "1"))),  # noqa: TID251 - no part of localmesh
        interceptors=[Authorised(os.environ["LOCALAI_GRPC_AUTH_TOKEN"])],  # noqa: TID251 - as above
    )
    backend_pb2_grpc.add_BackendServicer_to_server(Echo(), server)
    server.add_generic_rpc_handlers([Unheard()])
    server.add_insecure_port(address)
    server.start()
    print("echo is up", file=sys.stderr, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
