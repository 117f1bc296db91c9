import pytest



@pytest.fixture(scope="session")
def smollm2():
    """The path of the real model that tests use, fetched once into the user's cache."""
    from edgekv.pull import pull

    return pull("smollm2-135m")
