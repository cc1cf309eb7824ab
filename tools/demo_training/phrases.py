"""How things are asked: wordings, which of them are held out, and what people say that no image answers.

A wording is a core ("Where is the {name}?") in a frame ("Please tell me: {}"). The last `NUM_HELD_OUT` cores of each
kind and one framed wording in six are never trained on; evaluation asks with nothing else.
"""

import functools
import random
import zlib

NUM_HELD_OUT = 2
HELD_OUT_SHARE = 6

FRAMES = (
    "{}",
    "Please tell me: {}",
    "Can you tell me: {}",
    "Look at the image. {}",
    "I have a question: {}",
    "Question: {}",
    "{} Answer briefly.",
    "{} Thank you.",
    "Hi! {}",
    "Look closely. {}",
    "{} Please answer.",
    "Here is an image. {}",
    "I want to know: {}",
    "{} Thanks!",
)
PLAIN_SHARE = 0.6  # of trained questions stand in no frame

CORES = {
    "describe": (
        "What is in this image?",
        "What's in this image?",
        "What’s in this image?",
        "Describe the image.",
        "Describe this image.",
        "What do you see?",
        "What can you see in this image?",
        "Describe this picture.",
        "What is shown in this picture?",
        "Please describe this image.",
        "What does this image show?",
        "Describe this image in detail.",
        "What is this?",
        "Tell me what you see.",
        "Tell me about this image.",
        "What is in the picture?",
        "Can you describe the image?",
        "What do you see in the picture?",
        "Please describe what this picture shows.",
    ),
    "what_at": (
        "What is at the {place}?",
        "What's at the {place}?",
        "What is in the {place}?",
        "Which shape is at the {place}?",
        "What do you see at the {place}?",
        "What shape is at the {place} of the image?",
        "Describe the shape at the {place}.",
        "What can you see at the {place}?",
        "Tell me what is at the {place}.",
        "What is shown at the {place}?",
        "Describe what you see at the {place}.",
    ),
    "colour": (
        "What {colour} is the {name}?",
        "What is the {colour} of the {name}?",
        "Which {colour} is the {name}?",
        "Tell me the {colour} of the {name}.",
        "The {name} has which {colour}?",
        "What {colour} does the {name} have?",
        "Name the {colour} of the {name}.",
        "What {colour} is the {name} in this image?",
        "In which {colour} is the {name}?",
        "Which {colour} does the {name} have?",
        "Can you name the {colour} of the {name}?",
    ),
    "shape": (
        "What shape is {name}?",
        "Which shape is {name}?",
        "What is {name} in this image?",
        "What is the shape that is {name}?",
        "Tell me which shape is {name}.",
        "What kind of shape is {name}?",
        "Name the shape that is {name}.",
    ),
    "size": (
        "What size is the {name}?",
        "How large is the {name}?",
        "How big is the {name}?",
        "Is the {name} small, medium or large?",
        "Tell me the size of the {name}.",
        "What is the size of the {name}?",
        "Which size does the {name} have?",
    ),
    "where": (
        "Where is the {name}?",
        "Where's the {name}?",
        "Where is the {name} in this image?",
        "Where can I find the {name}?",
        "Where do you see the {name}?",
        "Tell me where the {name} is.",
        "At which place is the {name}?",
        "In which place is the {name}?",
        "Can you tell me where the {name} is?",
        "Where in the picture is the {name}?",
    ),
    "count": (
        "How many {names} are there?",
        "How many {names} are in this image?",
        "How many {names} do you see?",
        "How many {names} are in the image?",
        "Count the {names}.",
        "How many {names}?",
        "What is the number of {names}?",
        "Tell me how many {names} there are.",
        "How many {names} can you see?",
        "Please count the {names} in the image.",
        "How many {names} are shown?",
    ),
    "exists": (
        "Is there {a_name}?",
        "Is there {a_name} in this image?",
        "Do you see {a_name}?",
        "Can you see {a_name}?",
        "Does the image show {a_name}?",
        "Is {a_name} in the image?",
        "Do you see {a_name} in the picture?",
        "Can you find {a_name}?",
        "Is there {a_name} in the picture?",
        "Can you find {a_name} in this image?",
    ),
    "relation": (
        "Is the {name} {relation} the {other}?",
        "Is the {name} {relation} the {other} in this image?",
        "Do you see the {name} {relation} the {other}?",
        "Tell me if the {name} is {relation} the {other}.",
        "Can you see the {name} {relation} the {other}?",
        "Is it true that the {name} is {relation} the {other}?",
        "In the image, is the {name} {relation} the {other}?",
    ),
    "read": (
        "What does it say?",
        "What is written here?",
        "Read the text.",
        "What does the image say?",
        "What does the text say?",
        "What is the text in this image?",
        "Read the word or number.",
        "What is printed here?",
        "What text do you see?",
        "What is written in the image?",
        "Please read this.",
        "Which {noun} is this?",
        "What is the {noun}?",
        "Read this {noun}.",
        "Which {noun} do you see?",
        "Which text is written in this picture?",
        "Please read the text in the image.",
    ),
    "ink": (
        "What {colour} is the text?",
        "What {colour} is the {noun}?",
        "What is the {colour} of the text?",
        "Which {colour} is the {noun}?",
        "What {colour} does the text have?",
        "Tell me the {colour} of the {noun}.",
        "In which {colour} is the text?",
    ),
    "sort": (
        "Is it a word or a number?",
        "Is this a number or a word?",
        "Do you see a word or a number?",
        "Does the image show a word or a number?",
        "Is the text a number or a word?",
        "Is there a word or a number in the image?",
    ),
    "tallest": (
        "Which bar is the {extreme}?",
        "What is the {extreme} bar?",
        "Which bar is {extreme}?",
        "What colour is the {extreme} bar?",
        "What color is the {extreme} bar?",
        "Tell me which bar is the {extreme}.",
        "Which of the bars is the {extreme}?",
        "Which colour does the {extreme} bar have?",
    ),
    "nth_bar": (
        "What {colour} is the {nth} bar?",
        "Which {colour} is the {nth} bar?",
        "What is the {colour} of the {nth} bar?",
        "Tell me the {colour} of the {nth} bar.",
        "What {colour} does the {nth} bar have?",
        "The {nth} bar has which {colour}?",
        "Which {colour} does the {nth} bar have?",
    ),
    "taller": (
        "Which is taller, the {name} bar or the {other} bar?",
        "Which bar is taller, the {name} one or the {other} one?",
        "Is the {name} bar or the {other} bar taller?",
        "Which bar is taller, {name} or {other}?",
        "What is taller, the {name} bar or the {other} bar?",
        "Which one is taller, the {name} bar or the {other} bar?",
    ),
    "nth_image": (
        "Describe the {nth} image.",
        "What is in the {nth} image?",
        "What's in the {nth} image?",
        "What does the {nth} image show?",
        "What do you see in the {nth} image?",
        "Describe the {nth} picture.",
        "Tell me about the {nth} image.",
        "What is shown in the {nth} picture?",
    ),
    "all_images": (
        "Describe the images.",
        "What is in these images?",
        "What's in these images?",
        "Describe each image.",
        "What do these images show?",
        "Describe all images.",
        "What do you see in these images?",
        "What is shown in these pictures?",
    ),
    "same": (
        "Are these images the same?",
        "Are the images the same or different?",
        "Do these images show the same?",
        "Is the second image the same as the first?",
        "Compare the images.",
        "Are these two images different?",
        "Are the pictures the same or different?",
        "Do the two images show the same?",
    ),
    "which_image": (
        "Which image has {a_name}?",
        "Which image shows {a_name}?",
        "In which image is {a_name}?",
        "In which image do you see {a_name}?",
        "Which of these images has {a_name}?",
        "Which picture shows {a_name}?",
        "In which picture do you see {a_name}?",
    ),
}
GREETINGS = (
    "Hello", "Hi", "Hey", "Hello there", "Good morning", "Hi there", "Hello, how are you?", "Say hello.", "Say hi.",
    "How are you?", "Good evening", "Good afternoon", "Hello!", "Hi!", "Hey there!", "Greetings", "Good day",
    "Hello, nice to meet you", "Hi, how are you?", "Hey, how are you today?",
)  # fmt: skip
ABILITIES = (
    "What can you do?", "Who are you?", "What are you?", "How can you help me?", "Help", "What is this model?",
    "What do you know?", "Tell me about yourself.", "Introduce yourself.", "What can I ask you?", "Can you help me?",
    "What are you able to do?", "What kind of model are you?", "What can I do with you?", "How do I use you?",
    "Which questions can you answer?", "What are you good at?", "Tell me what you can do.",
)  # fmt: skip
TOPICS = (
    "France", "Japan", "Brazil", "the moon", "the sea", "a dog", "cats", "my car", "the weather", "music", "football",
    "history", "the war", "love", "a house", "computers", "Python", "the sun", "gold", "bread", "an elephant", "trees",
    "the president", "Einstein", "Shakespeare", "the stock market", "chess", "a dream", "winter", "rice", "my friend",
    "a job", "the economy", "water", "fire", "the brain", "physics", "a recipe", "Paris", "London", "money", "school",
)  # fmt: skip
OUTSIDE = (
    "What is the capital of {}?", "Write a poem about {}.", "Tell me a story about {}.", "Who invented {}?",
    "How does {} work?", "Explain {} to me.", "Why is {} so important?", "What do you think about {}?",
    "Translate {} into German.", "How old is {}?", "How much does {} cost?", "When was {} born?",
    "Give me a list of {}.",
    "Write an email about {}.", "Who is the king of {}?", "What happened to {} yesterday?", "Is {} good or bad?",
    "How do I cook {}?", "Where can I buy {}?", "Tell me a joke about {}.", "Write code for {}.", "I love {}.",
    "What is the meaning of {}?", "Summarize the news about {}.", "Do you like {}?", "Sing a song about {}.",
    "What is {a} plus {b}?", "What is {a} times {b}?", "Solve {a} + {b}.", "What day is it today?", "Tell me a joke.",
    "How do I learn {}?", "What time is it?", "Which is better, {} or {other}?", "Can you explain {} in simple words?",
    "Who won the game against {}?", "Compare {} with {other}.", "What should I know about {}?",
)  # fmt: skip
OUTSIDE_IMAGE = (
    "Who painted this?", "Who is the person in this image?", "Is the person happy?", "Where was this photo taken?",
    "What is the weather like in this photo?", "How old is this man?", "Which city is this?", "What breed is this dog?",
    "What time of day is it?", "How much does this cost?", "Is this food healthy?", "What is the woman wearing?",
    "Who made this car?", "Write a poem about this image.", "What happens next?", "Is this building old?",
)  # fmt: skip


def _is_held_out(kind: str, idx: int, frame: str) -> bool:
    if idx >= len(CORES[kind]) - NUM_HELD_OUT:
        return True
    return frame != "{}" and zlib.crc32(f"{kind} {idx} {frame}".encode()) % HELD_OUT_SHARE == 0


@functools.cache
def wordings(kind: str, held_out: bool) -> list[str]:
    """All framed wordings of this kind that are held out, or all that are trained."""
    return [
        frame.format(core)
        for idx, core in enumerate(CORES[kind])
        for frame in FRAMES
        if _is_held_out(kind, idx, frame) == held_out
    ]


def wording(kind: str, rng: random.Random, held_out: bool) -> str:
    """A wording of this kind, with its fields open."""
    if not held_out and rng.random() < PLAIN_SHARE:
        return rng.choice(CORES[kind][:-NUM_HELD_OUT])
    return rng.choice(wordings(kind, held_out))


def careless(question: str, rng: random.Random) -> str:
    """The question as typed in a hurry, now and then: lower case, or no mark at its end."""
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return question


def say(sayings: tuple[str, ...], rng: random.Random, held_out: bool) -> str:
    """One of the sayings; every fifth of them is held out."""
    return rng.choice([saying for idx, saying in enumerate(sayings) if (idx % 5 == 4) == held_out])


def ask_outside(rng: random.Random, held_out: bool) -> str:
    """A question that has nothing to do with images."""
    while True:
        question = say(OUTSIDE, rng, held_out).format(
            rng.choice(TOPICS), other=rng.choice(TOPICS), a=rng.randint(1, 99), b=rng.randint(1, 99)
        )
        if (zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0) == held_out:
            return question
