"""Words and wordings of the synthetic world: names, values, statements and questions. Plain data, no logic."""

from __future__ import annotations

from dataclasses import dataclass

CONSONANTS = ("B", "D", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "V", "W", "Z")
LETTERS = ("bcdfghjklmnpqrstvwxyzstrnlm", "aeiouyaeiounrlsth")
FIRST_PIECES = tuple(c + v for c in CONSONANTS for v in "aeiou")
LAST_PIECES = tuple(
    c + v + e for i, c in enumerate("bdfgklmnprstvz") for j, v in enumerate("aeiou") for e in ("nrlsmt"[(i + j) % 6],)
)

NAMES = tuple(
    """Alice Maria Wes Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Nina Oscar Paul Quinn Rosa
    Sam Tina Uma Victor Wendy Xavier Yara Zoe Ahmed Bianca Carlos Diana Erik Fatima George Hana Ivan Julia Kenji
    Laura Marco Nora Omar Priya Rachel Stefan Tara Viktor Anna Ben Clara Dan Elena Felix Gina Hugo Iris James
    Kate Liam Mia Noah Olga Peter Ruth Simon Tom Vera Adam Beth Ida Lena Max Sofia Tim John Lisa Mark Sara""".split()
)

VALUES: dict[str, tuple[str, ...]] = {
    "city": tuple(
        """Seattle Denver Madrid Oslo Paris Berlin Rome London Vienna Prague Lisbon Dublin Athens Boston Chicago
        Dallas Houston Portland Austin Miami Tokyo Kyoto Seoul Delhi Mumbai Cairo Lagos Nairobi Lima Quito Toronto
        Sydney Geneva Zurich Munich Hamburg Milan Turin Porto Bergen Helsinki Warsaw Krakow Budapest Riga""".split()
    ),
    "company": tuple(
        """Boeing Google Apple Amazon Microsoft Intel Siemens Toyota Sony Nokia Philips Bosch Airbus Ikea Nestle
        Samsung Oracle Adobe Netflix Shell Pfizer Bayer Volvo Honda Ford Tesla Lego Adidas Nike Visa""".split()
    ),
    "pet": tuple("cat dog parrot rabbit hamster turtle goldfish lizard ferret pony snake canary gecko frog".split()),
    "food": tuple(
        "pizza sushi pasta tacos curry soup salad noodles rice bread cheese pancakes ramen stew pie".split()
    ),
    "colour": tuple(
        "red blue green yellow purple orange pink black white brown grey teal violet gold silver".split()
    ),
    "instrument": tuple("piano violin guitar cello flute trumpet drums harp clarinet banjo tuba".split()),
    "hobby": tuple("chess sailing knitting painting hiking fishing gardening climbing pottery surfing yoga".split()),
    "language": tuple("English Spanish French German Italian Greek Polish Turkish Arabic Hindi Korean Dutch".split()),
    "drink": tuple("coffee tea water milk juice lemonade cocoa cider cola".split()),
    "car": tuple("Fiat Jeep Mazda Subaru Lexus Skoda Kia Porsche Volkswagen".split()),
    "school": tuple("Harvard Oxford Stanford Cambridge Princeton Yale Cornell Duke".split()),
}
LOWER_CASE = frozenset({"pet", "food", "colour", "instrument", "hobby", "drink"})

KINSHIP = ("sister", "brother", "friend", "boss", "mother", "father", "cousin", "neighbour", "wife", "husband")

QUICKSTART_WORDS = frozenset({"alice", "maria", "seattle", "denver", "boeing"})


@dataclass(frozen=True)
class Attribute:
    """One kind of fact. `third`, `first`: verb phrases after a name or "I"; `noun`: after "Alice's" or "My"."""

    kind: str
    third: tuple[str, ...]
    first: tuple[str, ...]
    noun: tuple[str, ...]
    questions: tuple[str, ...]


ATTRIBUTES: dict[str, Attribute] = {
    "home": Attribute(
        "city",
        ("lives in {v}", "has a flat in {v}"),
        ("live in {v}", "have a flat in {v}"),
        ("home is in {v}",),
        (
            "Where does {n} live?",
            "In which city does {n} live?",
            "What city does {n} live in?",
            "Where is {n}'s home?",
        ),
    ),
    "work": Attribute(
        "company",
        ("works at {v}", "works for {v}", "has a job at {v}"),
        ("work at {v}", "work for {v}", "have a job at {v}"),
        ("employer is {v}",),
        (
            "What company does {n} work for?",
            "Where does {n} work?",
            "Which company does {n} work at?",
            "Who is {n}'s employer?",
        ),
    ),
    "pet": Attribute(
        "pet",
        ("has a pet {v}", "keeps a {v}"),
        ("have a pet {v}", "keep a {v}"),
        ("pet is a {v}",),
        ("What pet does {n} have?", "What animal does {n} keep?", "What is {n}'s pet?"),
    ),
    "food": Attribute(
        "food",
        ("likes to eat {v}", "loves {v}"),
        ("like to eat {v}", "love {v}"),
        ("favourite food is {v}",),
        ("What does {n} like to eat?", "What food does {n} love?", "What is {n}'s favourite food?"),
    ),
    "colour": Attribute(
        "colour",
        ("likes the colour {v}",),
        ("like the colour {v}",),
        ("favourite colour is {v}",),
        ("What colour does {n} like?", "What is {n}'s favourite colour?"),
    ),
    "instrument": Attribute(
        "instrument",
        ("plays the {v}",),
        ("play the {v}",),
        ("instrument is the {v}",),
        ("What instrument does {n} play?", "What does {n} play?", "What is {n}'s instrument?"),
    ),
    "hobby": Attribute(
        "hobby",
        ("enjoys {v}", "spends weekends on {v}"),
        ("enjoy {v}", "spend weekends on {v}"),
        ("hobby is {v}",),
        ("What does {n} enjoy?", "What is {n}'s hobby?", "What hobby does {n} have?"),
    ),
    "language": Attribute(
        "language",
        ("speaks {v}",),
        ("speak {v}",),
        ("first language is {v}",),
        ("What language does {n} speak?", "Which language does {n} speak?", "What is {n}'s first language?"),
    ),
    "drink": Attribute(
        "drink",
        ("drinks {v}",),
        ("drink {v}",),
        ("favourite drink is {v}",),
        ("What does {n} drink?", "What is {n}'s favourite drink?"),
    ),
    "car": Attribute(
        "car",
        ("drives a {v}",),
        ("drive a {v}",),
        ("car is a {v}",),
        ("What car does {n} drive?", "What does {n} drive?", "What is {n}'s car?"),
    ),
    "birth": Attribute(
        "city",
        ("was born in {v}", "grew up in {v}"),
        ("was born in {v}", "grew up in {v}"),
        ("birthplace is {v}",),
        ("Where was {n} born?", "Where did {n} grow up?", "What is {n}'s birthplace?"),
    ),
    "school": Attribute(
        "school",
        ("studied at {v}", "went to {v}"),
        ("studied at {v}", "went to {v}"),
        ("school was {v}",),
        ("Where did {n} study?", "Which school did {n} go to?", "What was {n}'s school?"),
    ),
}

SPEAKER_INTRO = ("Notes from {n}:", "{n} says:", "From the diary of {n}:")
PRONOUN_INTRO = ("{n} came by on Monday.", "I met {n} yesterday.", "Today we talk about {n}.")
ALIAS_INTRO = ("{n} goes by the name {a}.", "{n} is also known as {a}.", "Everyone calls {n} by the name {a}.")
CORRECTION = ("Correction: {new}, not {old}.", "{old} is out of date, it is {new} now.", "Change {old} to {new}.")
FILLERS = (
    "The meeting was moved to Friday.",
    "It rained all day.",
    "The printer on the second floor is broken.",
    "Remember to water the plants.",
    "The train was late again.",
    "Lunch was good today.",
    "The report is due next week.",
    "We had a long call this morning.",
    "The garden looks lovely in spring.",
    "Dinner starts at seven.",
)
SYSTEM_TEXTS = ("You are a helpful assistant.", "Answer briefly.", "You are a friendly assistant. Be short.")
