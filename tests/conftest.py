import pytest

import edgekv  # noqa: F401  before any test imports llama_cpp: edgekv says which library it loads


@pytest.fixture(scope="session")
def smollm2():
    """The path of the real model that tests use, fetched once into the user's cache."""
    from edgekv.pull import pull

    return pull("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_qfilters(smollm2, tmp_path_factory):
    """The same with filters of its own; half a minute, once."""
    from edgekv.calibrate import calibrate
    from edgekv.convert import convert

    path = tmp_path_factory.mktemp("smollm2") / "smollm2-qfilters.gguf"
    convert(smollm2, path, calibrate(smollm2))
    return path


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2, tmp_path_factory):
    """The same as a Hugging Face checkpoint; needs torch, for slow tests."""
    from checkpoint import write_checkpoint

    return write_checkpoint(smollm2, tmp_path_factory.mktemp("checkpoint") / "SmolLM2-135M-Instruct")
