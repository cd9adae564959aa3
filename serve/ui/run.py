"""`cxray ui`: Streamlit on the page, for this machine alone."""

from importlib.util import find_spec
from pathlib import Path

from starlette.formparsers import MultiPartParser

from contracts.errors import CxrayError

LARGEST_MIB = 32  # an upload; the gateway takes no larger body

OPTIONS = {
    "server.address": "127.0.0.1",
    "server.headless": "true",  # opens no browser, asks for no e-mail address
    "server.fileWatcherType": "none",
    "server.maxUploadSize": str(LARGEST_MIB),
    "browser.gatherUsageStats": "false",
    "client.showErrorDetails": "none",  # a traceback may hold what was uploaded
    "client.showErrorLinks": "false",  # they would hand an error to a search engine
    "client.toolbarMode": "minimal",
}


def run(port: int) -> None:
    """Serves the page until it is stopped. Raises CxrayError where Streamlit is not installed."""
    if find_spec("streamlit") is None:
        raise CxrayError("the page needs Streamlit, which is not installed: pip install 'cxray[ui]'")
    from streamlit.web import cli

    keep_uploads_in_memory()
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    script = Path(__file__).with_name("page.py")
    cli.main(["run", str(script), "--server.port", str(port), *options], prog_name="streamlit", standalone_mode=False)


def keep_uploads_in_memory() -> None:
    """Starlette would put files above 1 MiB on disk, where a picture of a patient has no business."""
    MultiPartParser.spool_max_size = (LARGEST_MIB + 1) << 20
