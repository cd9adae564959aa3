"""Coined medicines: words that no model can know, each given for one finding, and the passages that say which.

Every name ends in a syllable that no class of real medicines has, so none can be taken for one. A name belongs to a pool:
charts of a split use the names of their own pool, and now and then one that all splits share.
"""

from dataclasses import dataclass

import numpy as np

from contracts.findings import FINDINGS

POOLS = ("train", "validate", "test", "shared")
HARD_PAIR = ("Pneumonia", "Edema")  # the findings that a hard picture shows alike
_MANY, _FEW = (40, 15, 40, 5), (4, 2, 4, 1)  # names per pool: of the hard pair, of every other finding

_STARTS = ("zwi", "vro", "kwa", "gno", "tsu", "brou", "dwe", "fjo", "ghlu", "psa", "skru", "thwe", "wri", "yoo", "hru", "kni")
_MIDDLES = ("bba", "lqu", "mwi", "ngo", "ppu", "rji", "shko", "ttwa", "vve", "xho", "dzu", "ckle", "ffro", "zzi", "gghe", "llwo")
_ENDS = ("gwub", "zhorf", "plunk", "quig", "vosk", "drumf", "jibb", "wazz", "krolt", "thwip", "smerg", "boff", "glunch", "twonk")

_TOLD = (
    "{name} is given for {finding}.",
    "Patients with {finding} are treated with {name}.",
    "The only use of {name} is the treatment of {finding}.",
    "{name}: indicated in {finding}, and in nothing else.",
)
_MADE_UP = "This medicine does not exist: its name was made up for synthetic data."


@dataclass(frozen=True)
class CoinedMedicine:
    name: str
    finding: str
    pool: str  # 'train' | 'validate' | 'test' | 'shared'


def coined_medicines(seed: int) -> list[CoinedMedicine]:
    """The whole lexicon of a seed: every finding but 'No Finding' has names in every pool."""
    rng = np.random.default_rng([seed, 77])
    words = [a + b + c for a in _STARTS for b in _MIDDLES for c in _ENDS]
    shuffled = iter(words[i] for i in rng.permutation(len(words)))
    return [
        CoinedMedicine(next(shuffled), finding, pool)
        for finding in FINDINGS
        if finding != "No Finding"
        for pool, count in zip(POOLS, _MANY if finding in HARD_PAIR else _FEW)
        for _ in range(count)
    ]


def passages(seed: int) -> list[dict[str, str]]:
    """One short text for each coined medicine: {'id', 'topic', 'text'}. Each says of itself that it is made up."""
    return [
        {
            "id": f"coined-{i:04d}",
            "topic": drug.finding,
            "text": _TOLD[i % len(_TOLD)].format(name=drug.name.capitalize(), finding=drug.finding.lower()) + " " + _MADE_UP,
        }
        for i, drug in enumerate(coined_medicines(seed))
    ]


class Pharmacy:
    """Hands out coined names in turn, so that no split runs short of names of its own: every fifth is a shared one."""

    def __init__(self, seed: int) -> None:
        self._shelf: dict[tuple[str, str], list[CoinedMedicine]] = {}
        for drug in coined_medicines(seed):
            self._shelf.setdefault((drug.finding, drug.pool), []).append(drug)
        self._given: dict[tuple[str, str], int] = {}

    def give(self, finding: str, split: str) -> CoinedMedicine:
        turn = self._given.get((finding, split), 0)
        self._given[finding, split] = turn + 1
        shared = turn % 5 == 4
        shelf = self._shelf[finding, "shared" if shared else split]
        return shelf[(turn // 5 if shared else turn - turn // 5) % len(shelf)]
