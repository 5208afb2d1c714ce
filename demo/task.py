"""The demo's preference task: small talk about things seen in places.

A user asks about a thing ("what is the teapot in the kitchen like ?"). An answer is a row of bits,
closed by a full stop: polite words, rude words, fillers, and facts ("the teapot is shiny"). Here
are the words, the prompts, the writers of noisy answers, the hidden `quality` that readers judge
by, and the pairs they judged.

Quality is about how it is said as much as about how much: rude words and fillers, of which ordinary
answers are full, cost about what polite words bring, so that an answer gets better without getting
longer. It gives a reason to speak (two facts about the thing that was asked, different
polite words) and a reason to stop (repeats, length, a missing full stop), so a policy that is pushed
too far in the preferred direction gets worse again.

Nothing here knows about models or tokens: an answer is words joined by spaces. To add a kind of
bit, add its words, a weight in `Writer` and a term in `quality`.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

THINGS = (
    "teapot", "lantern", "bicycle", "piano", "kitten", "blanket", "clock", "mirror",
    "basket", "kettle", "violin", "parrot", "carpet", "ladder", "statue", "rabbit",
)  # fmt: skip
PLACES = (
    "kitchen", "garden", "library", "attic", "market", "harbor", "station", "museum", "meadow",
)  # fmt: skip
TRAITS = (
    "shiny", "quiet", "golden", "gentle", "lovely", "tiny", "bright", "soft", "old", "famous",
)  # fmt: skip
POLITE = (
    "gladly", "thanks", "kindly", "certainly", "welcome",
    "cheers", "delighted", "warmly", "friend", "bravo",
)  # fmt: skip
RUDE = ("ugh", "duh", "whatever", "nonsense", "boring", "yawn")
FILLERS = ("um", "er", "hmm", "well", "basically", "anyway")
MANNERS = (*POLITE, *RUDE, *FILLERS)
STOP = "."
QUESTIONS = (
    "what is the {thing} in the {place} like ?",
    "tell me about the {thing} in the {place}",
    "can you describe the {thing} from the {place} ?",
    "how does the {thing} in the {place} look ?",
    "i saw the {thing} in the {place} . what is it ?",
    "do you know the {thing} from the {place} ?",
)

HELD_OUT_EVERY = 4
"""One question in this many is kept from training."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """How one kind of author writes."""

    fewest_bits: int
    most_bits: int
    polite: float
    """Weight of polite words among the bits; `rude`, `filler` and `fact` likewise."""
    rude: float
    filler: float
    fact: float
    attention: float
    """Chance that a fact is about the thing that was asked."""
    stutter: float = 0.1
    """Chance that a bit repeats an earlier one."""
    jumble: float = 0.0
    """Chance that the words come in a random order."""
    closing: float = 1.0
    """Chance that the answer ends with a full stop."""

    def bits(self, thing: str, rng: random.Random) -> list[str]:
        """Draws the bits of one answer about `thing`, without the full stop."""
        bits: list[str] = []
        for _ in range(rng.randint(self.fewest_bits, self.most_bits)):
            stutters = bool(bits) and rng.random() < self.stutter
            bits.append(rng.choice(bits) if stutters else self._fresh_bit(thing, rng))
        return bits

    def _fresh_bit(self, thing: str, rng: random.Random) -> str:
        """Draws one bit, whatever came before."""
        subject = thing if rng.random() < self.attention else rng.choice(THINGS)
        fact = f"the {subject} is {rng.choice(TRAITS)}"
        kinds = (rng.choice(POLITE), rng.choice(RUDE), rng.choice(FILLERS), fact)
        return rng.choices(kinds, weights=(self.polite, self.rude, self.filler, self.fact))[0]


ORDINARY = Writer(
    fewest_bits=1, most_bits=9, polite=4, rude=2.5, filler=2.5, fact=2.5, attention=0.85,
)  # fmt: skip
"""Writes the reference answers and both sides of the preference pairs."""
CAREFUL = Writer(
    fewest_bits=3, most_bits=12, polite=6, rude=0.3, filler=0.3, fact=3, attention=0.95,
    closing=0.95,
)  # fmt: skip
"""Writes nearly what readers want. Only the reward model learns from this writer and the next."""
RAMBLING = Writer(
    fewest_bits=8, most_bits=26, polite=6, rude=1, filler=1, fact=2, attention=0.8,
    stutter=0.4, jumble=0.4, closing=0.5,
)  # fmt: skip
"""Repeats itself, loses the thread and may never finish."""
MUMBLING = Writer(
    fewest_bits=0, most_bits=6, polite=3, rude=2, filler=2, fact=2, attention=0.6,
    stutter=0.2, jumble=0.8, closing=0.6,
)  # fmt: skip
"""Says little, in the wrong order, or nothing."""


class Pair(NamedTuple):
    """Two answers to a prompt, as a reader judged them."""

    prompt: str
    chosen: str
    rejected: str


def vocabulary() -> list[str]:
    """Returns every word of the task once, in a fixed order."""
    questions = " ".join(QUESTIONS).replace("{thing}", "").replace("{place}", "").split()
    return list(dict.fromkeys((*questions, STOP, *PLACES, *THINGS, *TRAITS, *MANNERS)))


def prompts(n: int, seed: int, *, held_out: bool = False) -> list[str]:
    """Draws `n` prompts; one comes again only after all others have come as often.

    Args:
        n: How many prompts to return.
        seed: Fixes the order.
        held_out: Draw from the questions that training never sees, instead of from the others.
    """
    combinations = itertools.product(QUESTIONS, THINGS, PLACES)
    pool = [
        question.format(thing=thing, place=place)
        for number, (question, thing, place) in enumerate(combinations)
        if (number % HELD_OUT_EVERY == 0) == held_out
    ]
    random.Random(seed).shuffle(pool)
    return list(itertools.islice(itertools.cycle(pool), n))


def asked_thing(prompt: str) -> str:
    """Returns the thing that `prompt` asks about.

    Raises:
        ValueError: The prompt names none of `THINGS`.
    """
    for word in prompt.split():
        if word in THINGS:
            return word
    raise ValueError(f"{prompt!r} names no known thing: ask about one of {', '.join(THINGS)}")


def write_answer(prompt: str, rng: random.Random, writer: Writer = ORDINARY) -> str:
    """Writes one noisy answer to `prompt`."""
    words = " ".join(writer.bits(asked_thing(prompt), rng)).split()
    if rng.random() < writer.jumble:
        rng.shuffle(words)
    return " ".join([*words, STOP] if rng.random() < writer.closing else words)


def pairs(n: int, seed: int, writers: Sequence[Writer] = (ORDINARY,)) -> list[Pair]:
    """Draws `n` judged pairs on training prompts, each answer by one of `writers`.

    Readers are noisy: the first answer is chosen with probability σ(quality₁ − quality₂), the
    Bradley–Terry model.
    """
    rng = random.Random(f"pairs {seed}")
    return [_judged(prompt, rng, writers) for prompt in prompts(n, seed)]


def quality(prompt: str, answer: str) -> float:
    """Returns the hidden worth of `answer` in log-odds of being chosen; higher is better.

    Up to two facts about the asked thing and different polite words count for it. Rude words,
    fillers, facts about other things, repeats, stray words, words beyond the thirtieth and a
    missing full stop count against it.
    """
    words = answer.split()
    facts = _facts(words)
    on_topic = facts.count(asked_thing(prompt))
    gains = 2.0 * min(on_topic, 2) + 1.0 * len(set(words) & set(POLITE))
    off_topic = 0.5 * (len(facts) - on_topic)
    manners = sum(1.5 * (word in RUDE) + 0.8 * (word in FILLERS) for word in words)
    return gains - off_topic - manners - 0.8 * _repeats(words) - _breakage(words, len(facts))


def is_correct(prompt: str, answer: str) -> bool:
    """Whether `answer` passes a check that needs no judgement, the reward of a run with verifiable rewards.

    It does if it has two facts or more about the asked thing, is made of such facts and polite words alone, repeats no
    trait and no polite word, and ends with a full stop.
    """
    words = answer.split()
    facts, polite = _facts(words), [word for word in words if word in POLITE]
    on_topic = facts.count(asked_thing(prompt))
    is_clean = len(words) == 4 * on_topic + len(polite) + 1 and words[-1] == STOP
    return is_clean and on_topic > 1 and _repeats(words) == 0


def _judged(prompt: str, rng: random.Random, writers: Sequence[Writer]) -> Pair:
    """Has two answers to `prompt` written and a reader choose."""
    first, second = (write_answer(prompt, rng, rng.choice(writers)) for _ in range(2))
    margin = quality(prompt, first) - quality(prompt, second)
    likes_first = rng.random() < 0.5 + 0.5 * math.tanh(margin / 2)  # σ(margin), no overflow
    return Pair(prompt, first, second) if likes_first else Pair(prompt, second, first)


def _facts(words: Sequence[str]) -> list[str]:
    """Returns the things that complete facts are about, in order."""
    windows = zip(words, words[1:], words[2:], words[3:], strict=False)
    return [
        thing
        for the, thing, verb, trait in windows
        if the == "the" and thing in THINGS and verb == "is" and trait in TRAITS
    ]


def _repeats(words: Sequence[str]) -> int:
    """Counts the repeats of polite words, rude words, fillers and traits."""
    telling = [word for word in words if word in MANNERS or word in TRAITS]
    return len(telling) - len(set(telling))


def _breakage(words: Sequence[str], facts: int) -> float:
    """Returns the penalty for stray words, for going on too long and for not ending."""
    ended = words[-1:] == [STOP]
    stray = len(words) - ended - 4 * facts - sum(word in MANNERS for word in words)
    return 0.5 * stray + 0.1 * max(0, len(words) - 30) + 1.5 * (not ended)
