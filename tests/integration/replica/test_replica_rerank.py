"""Rerank on a model that has a classifier head: a tiny one of random weights, so the order means nothing, but holds."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from localmesh.rpc.errors import from_rpc_error
from localmesh.thirdparty import backend_pb2
from localmesh.thirdparty.backend_pb2_grpc import BackendStub
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1.inference_service_pb2_grpc import InferenceServiceStub


async def test_documents_come_most_relevant_first_in_both_protocols(
    start_replica: Callable[..., Any],
    spec: Callable[..., Any],
    make_reranker: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = make_reranker(tmp_path / "rerank.gguf")
    replica = await asyncio.to_thread(lambda: start_replica(spec(slots=1), source_path=str(path)).ready())
    documents = ["a b c", "d e f", "x y z", "a a a"]
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        answer = await stub.Rerank(pb.RerankRequest(query="a b", documents=documents))
        assert sorted(r.index for r in answer.results) == [0, 1, 2, 3]
        scores = [r.score for r in answer.results]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) > 1
        assert answer.usage.prompt_tokens > 0
        best = await stub.Rerank(pb.RerankRequest(query="a b", documents=documents, top_n=2))
        assert [r.index for r in best.results] == [r.index for r in answer.results][:2]
        raw = await BackendStub(channel).Rerank(backend_pb2.RerankRequest(query="a b", documents=documents, top_n=1))
        assert raw.results[0].text == documents[answer.results[0].index]
        for request, field in (
            (pb.RerankRequest(documents=["a"]), "query"),
            (pb.RerankRequest(query="a"), "documents"),
            (pb.RerankRequest(query="a", documents=["a"], top_n=-1), "top_n"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Rerank(request)
            assert from_rpc_error(caught.value).metadata["field"] == field
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Rerank(pb.RerankRequest(query="a", documents=["a " * 100]))
        assert from_rpc_error(caught.value).reason == "PROMPT_TOO_LONG"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Embed(pb.EmbedRequest(inputs=["a"]))
        assert from_rpc_error(caught.value).reason == "CAPABILITY_UNSUPPORTED"
