"""The trials of a run that a machine which joined it holds: claimed one by one, handed in, or given back."""

from __future__ import annotations

import random
import socket

from optuna.storages import BaseStorage

from flashgen.compile import CompileReport
from flashgen.tuning import offers
from flashgen.tuning.interrupts import finishing_first
from flashgen.tuning.offers import Offer
from flashgen.tuning.shared_run import SharedRun, is_open
from flashgen.tuning.tried import Tried, told

# Other machines may take the first ones that it chose.
_TRIES = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
# A machine without work spends one part in so many of its time on looking for some.
_PAUSES_PER_LOOK = 20.0


class Pace:
    """How often a machine looks for work: less and less where there is none, or where looking takes long.

    A thousand of them may ask one storage, and whoever finds nothing must not keep the others from their work.
    """

    def __init__(self) -> None:
        self._pause_s = _FIRST_PAUSE_S / 2

    def pause_s(self, *, found: bool, took_s: float) -> float:
        """Return how long to wait after a look that took so long; no two machines wait alike."""
        self._pause_s = _FIRST_PAUSE_S if found else min(_LONGEST_PAUSE_S, 2 * self._pause_s)
        return max(self._pause_s, _PAUSES_PER_LOOK * took_s) * random.uniform(0.5, 1.0)


class Claims:
    """What one machine holds of one study; a Ctrl-C waits for the end of each step."""

    def __init__(self, storage: BaseStorage, study_id: int, run: SharedRun) -> None:
        self._storage = storage
        self._study_id = study_id
        self._run = run
        # By number, each with its number in the storage.
        self._held: dict[int, tuple[int, Offer]] = {}
        # A journal may give a trial to who had it before, though another has it now.
        self._given_back: set[int] = set()
        self._machine = socket.gethostname()

    def is_open(self) -> bool:
        """Return whether the run still works on this study."""
        return is_open(self._storage, self._study_id, self._run)

    def claim(self, *, measures: bool, spill_limit: int) -> Offer | None:
        """Return a trial that is this machine's now; None if there is none for it.

        Args:
            measures: whether it takes what others have compiled, and rather than the rest.
            spill_limit: bytes; what spills more is for the run to decide on.
        """
        found = [o for o in offers.open_offers(self._storage, self._study_id) if o.number not in self._given_back]
        fresh = [offer for offer in found if offer.report is None]
        compiled = [o for o in found if o.report is not None and o.report.resources.spills <= spill_limit]
        # Each its own, so that not all of them go for one.
        chosen = random.sample(fresh, min(_TRIES, len(fresh)))
        if measures:
            chosen = random.sample(compiled, min(_TRIES, len(compiled))) + chosen
        for offer in chosen:
            with finishing_first():
                trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, offer.number)
                if offers.claim(self._storage, trial_id):
                    self._held[offer.number] = trial_id, offer
                    return offer
        return None

    def hand_in(self, offer: Offer, tried: Tried) -> bool:
        """Finish a trial with what became of it; False if the run had given up on it."""
        with finishing_first():
            trial_id, _ = self._held.pop(offer.number)
            return offers.hand_in(self._storage, trial_id, *told(tried, machine=self._machine))

    def put_back(self, offer: Offer, report: CompileReport | None) -> bool:
        """Let another machine go on with a trial; False if the run had given up on it."""
        with finishing_first():
            trial_id, _ = self._held.pop(offer.number)
            self._given_back.add(offer.number)
            return offers.put_back(self._storage, trial_id, report)

    def give_back(self) -> int:
        """Let other machines do all that is held here, and return how many trials that is."""
        held = list(self._held.values())
        for _, offer in held:
            self.put_back(offer, None)
        return len(held)
