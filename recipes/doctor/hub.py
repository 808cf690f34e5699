"""Whether the Hub can be reached, within some seconds."""

import threading

from huggingface_hub import constants, get_token
from huggingface_hub.utils import get_session

from .report import FAIL, SKIP, Finding, said


PATIENCE = 5.0  # seconds


class HubLook:
    """Asks in a thread of its own: a name server that never answers knows no time limit."""

    answer: int | str | None = None

    def __init__(self):
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()

    def _ask(self):
        try:
            self.answer = get_session().head(constants.ENDPOINT, timeout=PATIENCE).status_code
        except Exception as error:
            self.answer = said(error, 200)


def check_hub(look: HubLook | None) -> str:
    if constants.HF_HUB_OFFLINE:
        raise Finding(SKIP, "offline by choice (HF_HUB_OFFLINE): only what is in the cache can be loaded")
    look = look or HubLook()
    look.thread.join(PATIENCE)
    answer = f"no answer within {PATIENCE:.0f} s" if look.answer is None else look.answer
    if not isinstance(answer, int) or answer >= 400 and answer not in (404, 405):  # a mirror without a start page
        found = answer if isinstance(answer, str) else f"answers with status {answer}"
        do = "Check the network, and HTTPS_PROXY where there is one; `export HF_HUB_OFFLINE=1` to do without the Hub."
        raise Finding(FAIL, f"{constants.ENDPOINT}: {found}", do)
    login = "logged in" if get_token() else "no token: gated checkpoints need `hf auth login`"
    return f"{constants.ENDPOINT} answers; {login}"
