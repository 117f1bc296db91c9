import pytest

import edgekv  # noqa: F401  before any test imports llama_cpp: edgekv says which library it loads


@pytest.fixture(scope="session")
def smollm2():
    """The path of the real model that tests use, fetched once into the user's cache."""
    from edgekv.pull import pull

    return pull("smollm2-135m")
