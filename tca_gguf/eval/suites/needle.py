"""needle: single facts. A text holds one fact of each of eight forms, so that none can be mistaken for another.

RULER-style single-key retrieval (Hsieh et al. 2024) on a grid of depths: the forms change places from text to text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tca_gguf.calib.facts import digits, pick, shuffled

from ..questions import NUMBER, WORD, Document, Question
from ..texts import Size, Tokenize, weave
from .base import TextSuite

CITIES = (
    "Lisbon", "Nairobi", "Kyoto", "Toronto", "Lima", "Oslo", "Cairo", "Dublin", "Hanoi", "Prague", "Quito", "Riga",
    "Seoul", "Tunis", "Vienna", "Warsaw", "Zagreb", "Athens", "Bogota", "Delhi", "Geneva", "Havana", "Jakarta", "Kigali",
)  # fmt: skip
CATS = ("Biscuit", "Domino", "Ginger", "Mittens", "Pepper", "Pickle", "Shadow", "Smokey", "Tiger", "Toffee")
FRUITS = ("apple", "apricot", "banana", "cherry", "grape", "lemon", "mango", "melon", "orange", "papaya", "peach", "plum")
COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
COUNTRIES = ("Brazil", "Chile", "Ethiopia", "Finland", "India", "Kenya", "Mexico", "Morocco", "Nepal", "Norway", "Peru", "Spain")


@dataclass(frozen=True)
class Form:
    """statement holds {city} and {answer}; question and answer_start hold {city}. The answer: so many digits, or a word."""

    statement: str
    question: str
    answer_start: str
    n_digits: int = 0
    words: tuple[str, ...] = ()


FORMS = (
    Form("The secret code for {city} is {answer}.", "What is the secret code for {city}?", "The secret code for {city} is", 5),
    Form("A ticket for the {city} museum costs {answer} crowns.", "How many crowns does a ticket for the {city} museum cost?",
         "A ticket for the {city} museum costs", 3),
    Form("The {city} orchestra has {answer} musicians.", "How many musicians does the {city} orchestra have?",
         "The {city} orchestra has", 3),
    Form("The old bridge in {city} is {answer} metres long.", "How many metres long is the old bridge in {city}?",
         "The old bridge in {city} is", 4),
    Form("The cat of the mayor of {city} is called {answer}.", "What is the cat of the mayor of {city} called?",
         "The cat of the mayor of {city} is called", words=CATS),
    Form("The favourite fruit of the elephant in the {city} zoo is the {answer}.",
         "What is the favourite fruit of the elephant in the {city} zoo?",
         "The favourite fruit of the elephant in the {city} zoo is the", words=FRUITS),
    Form("The night tram in {city} is painted {answer}.", "In which colour is the night tram in {city} painted?",
         "The night tram in {city} is painted", words=COLOURS),
    Form("The winner of the {city} marathon came from {answer}.", "From which country did the winner of the {city} marathon come?",
         "The winner of the {city} marathon came from", words=COUNTRIES),
)  # fmt: skip


class Needle(TextSuite):
    name = "needle"
    samples = 64
    per_document = len(FORMS)

    def document(self, tokenize: Tokenize, size: Size, source: Sequence[str], rng: random.Random) -> Document:
        forms, cities = shuffled(rng, FORMS), shuffled(rng, CITIES)
        answers = [pick(rng, form.words) if form.words else digits(rng, form.n_digits) for form in forms]
        facts = [form.statement.format(city=city, answer=answer) for form, city, answer in zip(forms, cities, answers, strict=False)]
        tokens, places = weave(tokenize, size, source, rng, facts)
        questions = tuple(
            Question(f"\n\nQuestion: {form.question.format(city=city)}\nAnswer: {form.answer_start.format(city=city)}", (answer,),
                     WORD if form.words else NUMBER, self.answer_tokens, place / size.n_tokens)
            for form, city, answer, place in zip(forms, cities, answers, places, strict=False)
        )  # fmt: skip
        return Document(tokens, questions)
