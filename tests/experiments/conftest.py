import pytest

from .processes import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    started = Processes(tmp_path_factory.mktemp("cache"))
    yield started
    started.close()
