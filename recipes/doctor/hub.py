"""Whether the Hub can be reached, within some seconds."""

import threading
from collections.abc import Iterator

from huggingface_hub import constants, get_token
from huggingface_hub.utils import get_session

from lavin.recipes.doctor.report import FAIL, OK, SKIP, Line, said


PATIENCE = 5.0  # seconds


class HubLook:
    """Asks in a thread of its own: a name server that never answers knows no time limit."""

    def __init__(self):
        self.answer: int | str | None = None
        self.thread: threading.Thread | None = None

    def start(self):
        if constants.HF_HUB_OFFLINE or self.thread is not None:
            return
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()

    def _ask(self):
        try:
            self.answer = get_session().head(constants.ENDPOINT, timeout=PATIENCE).status_code
        except Exception as error:
            self.answer = said(error, 200)

    def result(self) -> int | str:
        """The status of the Hub's answer, or what went wrong."""
        self.start()
        self.thread.join(PATIENCE)
        return f"no answer within {PATIENCE:.0f} s" if self.answer is None else self.answer


def check_hub(hub: HubLook) -> Iterator[Line]:
    if constants.HF_HUB_OFFLINE:
        yield Line(SKIP, "Hub", "offline by choice (HF_HUB_OFFLINE): only what is in the cache can be loaded")
        return
    answer = hub.result()
    if is_fine(answer):
        login = "logged in" if get_token() else "no token: gated checkpoints need `hf auth login`"
        yield Line(OK, "Hub", f"{constants.ENDPOINT} answers; {login}")
        return
    found = f"{constants.ENDPOINT}: {answer if isinstance(answer, str) else f'answers with status {answer}'}"
    do = "Check the network, and HTTPS_PROXY where there is a proxy; `export HF_HUB_OFFLINE=1` to do without the Hub."
    yield Line(FAIL, "Hub", found, do)


def is_fine(answer: int | str) -> bool:
    """Also of a mirror that has no start page."""
    return isinstance(answer, int) and (answer < 400 or answer in (404, 405))
