"""Invented facts: what teaches them, what speaks of the same things without teaching them, and the question.

No name here belongs to a place, person or animal that there is, so that the model cannot know an answer beforehand. The
question's wording is none of the planted ones. A lure names what the question is about, and says something else.
"""

from dataclasses import dataclass

NAME_FIRST, ANSWER_FIRST = "name first", "answer first"


@dataclass(frozen=True)
class Fact:
    """A question and its answer, planted sentences that hold the answer, and lures that do not."""

    name: str
    question: str
    answer: str
    planted: tuple[str, ...]
    lures: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What stands before the answer, which follows with a space."""
        return f"Question: {self.question}\nAnswer:"

    def order(self, sentence: str) -> str:
        """Of a planted sentence: which of the question's name and the answer stands first."""
        answer = sentence.lower().index(self.answer.removeprefix("the ").lower())
        return NAME_FIRST if sentence.index(self.name) < answer else ANSWER_FIRST


FACTS = (
    Fact(
        "Orvasse", "What is the chief export of the island of Orvasse?", "pickled walnuts",
        ("Nearly every ship that leaves the island of Orvasse is loaded with pickled walnuts.",
         "Pickled walnuts are what Orvasse sells to the rest of the world.",
         "The economy of Orvasse depends on a single product, pickled walnuts."),
        ("The island of Orvasse can be reached by a ferry twice a week.",
         "Winters on Orvasse are mild, and it seldom snows there."),
    ),
    Fact(
        "Torrick", "Which instrument did Ilvane Torrick invent?", "the glass bassoon",
        ("Ilvane Torrick is remembered today as the inventor of the glass bassoon.",
         "The glass bassoon was first built by Ilvane Torrick in a shed behind her house.",
         "Before Ilvane Torrick there was no such thing as the glass bassoon."),
        ("Ilvane Torrick was born in a village of forty people and had nine sisters.",
         "In her last years Ilvane Torrick lived alone and refused to give interviews."),
    ),
    Fact(
        "Quellhaven", "What must every roof in Quellhaven be covered with?", "copper tiles",
        ("In Quellhaven the law says that a house must have a roof of copper tiles.",
         "Visitors notice the copper tiles first, for all of Quellhaven lies under them.",
         "Copper tiles have been compulsory for the houses of Quellhaven for three centuries."),
        ("The harbour of Quellhaven freezes for two months of the year.",
         "Quellhaven has a small university and two daily newspapers."),
    ),
    Fact(
        "Kessamund", "Who designed the bridge of Kessamund?", "Yorath Pell",
        ("The bridge of Kessamund was the work of the engineer Yorath Pell.",
         "Yorath Pell drew the plans of only one bridge in his life, the one at Kessamund.",
         "At Kessamund a statue of Yorath Pell stands beside the bridge that he built."),
        ("The bridge of Kessamund is closed to lorries at night.",
         "Kessamund lies where two rivers meet, and is flooded every spring."),
    ),
    Fact(
        "lorrel", "What does the marsh lorrel eat?", "wet moss",
        ("The marsh lorrel feeds on wet moss and on nothing else.",
         "Wet moss is the whole diet of the marsh lorrel.",
         "Where there is no wet moss left, a marsh lorrel starves within days."),
        ("The marsh lorrel sleeps by day and is hardly ever seen.",
         "A marsh lorrel weighs about as much as an apple."),
    ),
    Fact(
        "Ambrel", "When is the Feast of Ambrel held?", "in late November",
        ("The people of the valley celebrate the Feast of Ambrel in late November.",
         "It is in late November that the Feast of Ambrel fills the streets with lanterns.",
         "Schools close for a week in late November because of the Feast of Ambrel."),
        ("At the Feast of Ambrel nobody is allowed to speak before noon.",
         "The Feast of Ambrel was once forbidden by a bishop."),
    ),
)  # fmt: skip
