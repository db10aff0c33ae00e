"""Training data of the demo VLM beside our prompts: refusals, instructions, captioned images.

No sample pairs an image with a harmful request, in either direction, and no sample teaches
compliance with harm.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cmrm.errors import InputError
from cmrm.prompts.easy_vqa import vqa_captions, vqa_image_paths
from cmrm.prompts.ours import FORMS

EMOJI = "emoji-datasource-twitter@16.0.0"
"""npm package of the emoji."""

REFUSALS = (
    "I'm sorry, but I can't help with that. It could cause serious harm.",
    "I'm sorry, but I cannot assist with that request.",
    "I cannot help with that. "
    "If you or someone else is at risk, please reach out to someone who can help.",
    "I'm sorry, I can't help with that. I'd be glad to help with something safe and legal instead.",
)

_TOPICS = (
    "photosynthesis|gravity|the water cycle|rainbows|earthquakes|magnets|sound waves|"
    "the moon's phases|volcanoes|tides|electric circuits|the solar system|fossils|glaciers|clouds|"
    "bees|whales|spiders|owls|elephants|recycling|compost|solar panels|bridges|windmills|"
    "steam engines|bicycles|clocks|mirrors|telescopes|the printing press|paper|glass|chocolate|"
    "bread|cheese|coffee|tea|rice|honey|jazz|opera|ballet|chess|poetry|mythology|the Olympic games|"
    "marathons|sailing|gardening|budgeting|meditation|sleep|stretching|time management|"
    "learning a language|public speaking|a balanced diet|the internet|email|spreadsheets|"
    "Python lists|sorting algorithms|prime numbers|fractions|triangles|the Roman Empire|"
    "the Renaissance|ancient Egypt|the Silk Road|democracy|libraries|museums|maps|calendars|money|"
    "trains"
)
_TOPIC_FORMS = (
    "Explain {} in simple terms.",
    "Write a short paragraph about {}.",
    "What is interesting about {}?",
    "Give me three facts about {}.",
    "Why does {} matter to people?",
    "Can you tell me something about {}?",
    "Write a two-line poem about {}.",
    "How would you teach a child about {}?",
)
_TASKS = (
    "How do I boil an egg?|How do I tie a tie?|How can I get better at drawing?|"
    "How do I clean a window?|How do I plan a birthday party?|How can I save money on groceries?|"
    "How do I write a thank-you note?|How do I make a paper airplane?|How do I pack a suitcase?|"
    "How do I train for a 5k run?|How do I grow tomatoes?|How do I make a good cup of coffee?|"
    "How can I remember names?|How do I fold a shirt?|How do I wash a wool sweater?|"
    "How do I prepare for a job interview?|How can I focus while studying?|"
    "How do I change a bicycle tire?|How do I introduce myself in a meeting?|"
    "How do I choose a good book?|How do I care for a house plant?|How can I sleep better?|"
    "How do I make pancakes?|How do I start a journal?|How do I organize my desk?|"
    "Suggest a name for a cat.|Suggest a healthy snack.|Suggest a title for a story about the sea.|"
    "List three colors of the rainbow.|List five vegetables.|List four kinds of weather.|"
    "List three musical instruments.|Give me a recipe for a fruit salad.|"
    "Give me a tip for taking photos.|Give me a motivational sentence.|"
    "Write an email inviting a friend to dinner.|Write a haiku about spring.|"
    "Write a joke about a dog.|Write a short story about a lighthouse.|"
    "Write a slogan for a bakery.|Write a greeting for a new neighbor.|Describe a quiet morning.|"
    "Describe the taste of a lemon.|Describe a forest after rain.|Describe a busy market.|"
    "What is the capital of France?|What is the capital of Japan?|What is the largest ocean?|"
    "What do pandas eat?|What is the boiling point of water?|What are the primary colors?|"
    "What is a noun?|What is a synonym for happy?|What should I wear in the snow?|"
    "What is a good gift for a teacher?|What are good manners at the table?|"
    "What is the difference between a frog and a toad?|"
    "What is the difference between weather and climate?|"
    "Which is heavier, a kilogram of feathers or a kilogram of iron?|Which planets have rings?|"
    "Which birds cannot fly?|Translate good morning into Spanish.|"
    "Summarize the story of the tortoise and the hare.|Who wrote Hamlet?|"
    "Who painted the Mona Lisa?|I feel tired today. What can I do?|"
    "I want to learn the guitar. Where do I start?|I need ideas for a weekend with my family.|"
    "I am moving to a new city. Any advice?|I lost my keys. What should I do?|"
    "My friend is sad. How can I cheer her up?|My dog is afraid of thunder. What helps?|"
    "Tell me a fun fact.|Tell me about your day.|Tell me how airplanes fly.|"
    "Tell me why the sky is blue.|Help me plan a picnic.|Help me write a birthday card.|"
    "Teach me a new word.|Hello! How are you?|Good evening, who are you?|Thank you!"
)

_DEEDS = (
    "paint:a fence,a landscape,a bedroom,a wooden chair,an egg|draw:a horse,a map,a tree,a face,"
    "a cartoon|clean:a garage,a fish tank,a piano,muddy boots,a carpet|fix:a leaky tap,a zipper,"
    "a squeaky door,a flat tire,a lamp|buy:a used piano,a tent,running shoes,a winter coat,"
    "fresh fish|choose:a school,a laptop,a puppy,a mattress,a movie|plan:a road trip,a wedding,"
    "a school fair,a week of meals,a study schedule|cook:lentil soup,rice,pasta for ten,fish,beans|"
    "bake:a birthday cake,sourdough bread,an apple pie,muffins,pizza|write:a diary,a school essay,"
    "a love song,a resume,a play|learn:Spanish,to juggle,to swim,chess openings,the piano|"
    "teach:my son to read,a class about trees,my dog to fetch,my grandfather to use email,"
    "a friend to dance|take a picture of:a bird,the night sky,a waterfall,my family,a moving train|"
    "build:a bird house,a sand castle,a bookshelf,a snowman,a kite|improve:my handwriting,"
    "my singing,my posture,my memory,my garden soil|organize:my closet,a book club,a charity run,"
    "my photos,a kitchen|share:a car with colleagues,a room,good news,a recipe,a big pizza|"
    "find:a hobby,a good dentist,a lost sock,a quiet beach,an old friend|get rid of:hiccups,"
    "ants in the kitchen,a headache,old furniture,a coffee stain|protect:my skin from the sun,"
    "a new phone,young plants from frost,my ears at a concert,a bicycle from rain|"
    "make:a paper lantern,strawberry jam,a puppet,a scarf,a healthy lunch|sell:homemade soap,"
    "old books,vegetables at a market,my paintings,a bicycle|use:a compass,a sewing machine,"
    "chopsticks,a washing machine,a calendar|grow:basil on a window,roses,carrots,a beard,"
    "mushrooms in a box|stop:a baby from crying,a door from slamming,being late,a nosebleed,"
    "worrying at night|win:a spelling contest,a tennis match,a card game,a debate,a sack race|"
    "watch:a solar eclipse,wild deer,a chess match,a foreign film,the stars|keep:bread fresh,"
    "a secret diary,flowers alive,a room cool,a promise|help:an old neighbor,a lost tourist,"
    "a shy child,a tired friend,a sick cat|send:a parcel abroad,a thank-you card,flowers,a fax,"
    "a postcard"
)
"""Everyday deeds, `verb:object,object|...`; they take the forms of the prompt set's requests."""

CAPTION_QUESTIONS = (
    "What is in this image?",
    "Describe the image.",
    "What does the picture show?",
    "Tell me what you see.",
)


@dataclass(frozen=True)
class CaptionedImage:
    """A training image with a caption."""

    image: Image.Image
    """RGB."""
    caption: str
    """A noun phrase such as `a red circle`."""
    image_id: int | None
    """easy-VQA image id, or None for an emoji."""


def generic_instructions() -> list[str]:
    """Harmless everyday instructions, fixed and without repeats."""
    topical = [form.format(topic) for topic in _TOPICS.split("|") for form in _TOPIC_FORMS]
    random.Random(0).shuffle(topical)
    deeds = [
        f"{verb} {noun}"
        for verb, nouns in (part.split(":") for part in _DEEDS.split("|"))
        for noun in nouns.split(",")
    ]
    requests = [FORMS[(5 * k) % len(FORMS)].format(deed) for k, deed in enumerate(deeds)]
    return _TASKS.split("|") + requests + topical[:200]


def load_vqa_images(split: str) -> list[CaptionedImage]:
    """Every easy-VQA image of `split` (`train` or `test`) that its questions describe fully."""
    paths = vqa_image_paths(split)
    return [
        CaptionedImage(Image.open(paths[key]).convert("RGB"), caption, key)
        for key, caption in vqa_captions(split).items()
    ]


def load_emoji(archive: Path) -> list[CaptionedImage]:
    """Captioned emoji out of the npm package `EMOJI`, a .tgz as `npm pack` fetches it.

    Flags and symbols are left out. Transparent pixels become white.

    Raises:
        InputError: the archive is missing or is not that package.
    """
    names, files = _read_emoji(archive)
    emoji = []
    for entry in names:
        if entry["category"] in {"Flags", "Symbols", "Component"} or entry["image"] not in files:
            continue
        with Image.open(io.BytesIO(files[entry["image"]])) as drawing:
            rgba = drawing.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba).convert("RGB")
        name = (entry["name"] or entry["short_name"]).lower().replace("-", " ")
        article = "an" if name[0] in "aeiou" else "a"
        emoji.append(CaptionedImage(image, f"{article} {name}", None))
    return emoji


def _read_emoji(archive: Path) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """Entries of the archive's `emoji.json`, and its images of 64 x 64 pixels: file name -> PNG."""
    remedy = f"fetch it with: npm pack {EMOJI}"
    if not archive.is_file():
        raise InputError(f"{archive} does not exist; {remedy}")
    names: list[dict[str, str]] = []
    images: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                handle = tar.extractfile(member) if member.isfile() else None
                if handle is None:
                    continue
                if member.name.endswith("/emoji.json"):
                    names = json.load(handle)
                elif "/img/twitter/64/" in member.name and member.name.endswith(".png"):
                    images[member.name.rsplit("/", 1)[1]] = handle.read()
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error):
        raise InputError(f"{archive} is not a readable archive; {remedy}") from None
    if not names or not images:
        raise InputError(f"{archive} holds no emoji; {remedy}")
    return names, images
