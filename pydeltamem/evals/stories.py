"""What people tell an assistant in the course of a day, and what they ask it later: `deltamem demo`. Data only.

Written by hand for this; no adapter is trained on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .world import Turn


@dataclass(frozen=True)
class Story:
    """A conversation, and questions about it, each with what is right: any of the values, as a whole word."""

    turns: tuple[Turn, ...]
    asks: tuple[tuple[str, tuple[str, ...]], ...]


STORIES = (
    Story(
        (
            ("Hi! I'm Marta, and I've just moved to Lisbon.", "Welcome to your new city, Marta!"),
            ("Thanks. I'm starting as a translator on Monday.", "Good luck with the first day."),
            ("Can you suggest something for dinner? I don't eat fish.", "How about a vegetable stew with rice?"),
            ("Sounds good. My cat Biscuit says hello, too.", "Hello to Biscuit!"),
        ),
        (
            ("What's my name?", ("Marta",)),
            ("Which city did I move to?", ("Lisbon",)),
            ("What is my new job?", ("translator",)),
            ("What is my cat called?", ("Biscuit",)),
        ),
    ),
    Story(
        (
            ("morning, my train leaves from Leeds at 9", "I hope it is a smooth ride."),
            ("im going to see my brother Tom, he's a baker", "Say hello to Tom from me."),
            ("any idea for a present? he likes jazz", "A good jazz record would be a nice thing to unwrap."),
            ("great. ill be back on Thursday", "Then have a good trip until Thursday."),
        ),
        (
            ("Where does my train leave from?", ("Leeds",)),
            ("What's my brother called?", ("Tom",)),
            ("What music does my brother like?", ("jazz",)),
            ("When do I come back?", ("Thursday",)),
        ),
    ),
    Story(
        (
            ("Good evening. My daughter Nina turns seven on Saturday.", "How lovely! Are you planning a party?"),
            ("Yes, at the zoo. She loves penguins.", "She will have a wonderful time there."),
            ("I have to bake a cake, lemon is her favourite.", "A lemon cake it is."),
            ("How do I keep it moist?", "Do not bake it too long, and brush it with syrup."),
        ),
        (
            ("What is my daughter's name?", ("Nina",)),
            ("Where is the party?", ("zoo",)),
            ("Which animals does my daughter love?", ("penguins",)),
            ("Which cake am I going to bake?", ("lemon",)),
        ),
    ),
    Story(
        (
            ("I sold my old car and bought a red bicycle.", "Enjoy the fresh air!"),
            ("I ride it to the hospital, I work there as a nurse.", "That is a fine way to get to work."),
            ("On Sundays I sing in a choir.", "Singing is good for the soul."),
            ("What could I read on holiday? I'm off to Norway in June.", "A crime novel suits a long evening."),
        ),
        (
            ("What colour is my bicycle?", ("red",)),
            ("What do I work as?", ("nurse",)),
            ("What do I do on Sundays?", ("sing", "choir", "singing")),
            ("Which country am I going to?", ("Norway",)),
        ),
    ),
    Story(
        (
            ("Hello, this is Omar. I'm learning the cello.", "A beautiful instrument, Omar."),
            ("My teacher lives in Vienna, we meet online.", "It is good that it works from afar."),
            ("My dog howls along. He's called Pepper.", "Then you have a duet!"),
            ("I also have an exam in chemistry next week.", "I'll keep my fingers crossed for you."),
        ),
        (
            ("Which instrument am I learning?", ("cello",)),
            ("Where does my teacher live?", ("Vienna",)),
            ("What's my dog called?", ("Pepper",)),
            ("What subject is my exam in?", ("chemistry",)),
        ),
    ),
    Story(
        (
            ("We're repainting the kitchen, in green this time.", "Green is a calm colour for a kitchen."),
            ("My wife Ines wanted yellow, but the paint was sold out.", "Perhaps yellow curtains, then?"),
            ("Ha, good idea. Our neighbour is a plumber and helps us.", "That is a useful neighbour."),
            ("When it's done we'll make pizza for everybody.", "A fine reward for the work."),
        ),
        (
            ("What colour is our kitchen going to be?", ("green",)),
            ("What is my wife's name?", ("Ines",)),
            ("What is our neighbour's job?", ("plumber",)),
            ("What are we going to make when it's done?", ("pizza",)),
        ),
    ),
)
