"""Write the words of the bundled model: two tokenizers, and documents from which its language model learns to read.

    python training/make_texts.py --sprites DIR --output DIR

OUTPUT/tokenizer/         byte-level BPE as OPT's, whose newline ends a text
OUTPUT/text_tokenizer/    WordPiece as BERT's, for the Q-Former
OUTPUT/documents.txt      one scene a document: captions, questions and answers in any order, one a line
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GPT2Tokenizer

from blip2rt import Blip2rtError, InputError
from blip2rt.data.scenes import Scenes, Sprites
from blip2rt.data.scenes.words import Lexicon
from blip2rt.progress import progress
from blip2rt.tokenizer import CAPTION_PROMPT, QUESTION_PROMPT

BOS, PAD, EOS, UNK, IMAGE = "<s>", "<pad>", "</s>", "<unk>", "<image>"  # ids 0, 1, 2, 3 as in OPT; the last id
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SAMPLE = 3000  # scenes from whose texts the byte-level BPE learns its words
PROMPTED = 0.7  # share of the captions in documents that begin with the prompt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write tokenizers and documents of composed scenes.")
    parser.add_argument("--sprites", type=Path, required=True, metavar="DIR", help="of STYLE/NAME.png")
    parser.add_argument("--styles", nargs="+", metavar="STYLE", help="art styles (default: all)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vocab-size", type=int, default=1024, help="rows of both models (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=80_000, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        scenes = Scenes(Sprites.open(args.sprites, args.styles), "train")
        write_texts(scenes, args.output, args.vocab_size, args.documents)
    except (Blip2rtError, OSError) as error:
        print(f"make_texts: {error}", file=sys.stderr)
        return 1
    return 0


def write_texts(scenes: Scenes, output: Path, vocab_size: int, documents: int) -> None:
    """Both tokenizers, and `documents` scenes as texts.

    Args:
        scenes: the training split.
        output: folder for all of it.
        vocab_size: embedding rows of both models.
        documents: how many scenes to write.
    """
    output.mkdir(parents=True, exist_ok=True)
    lexicon = scenes.sprites.lexicon
    train_byte_tokenizer(_sample(scenes), vocab_size).save_pretrained(output / "tokenizer")
    word_tokenizer(lexicon, vocab_size, output / "text_tokenizer").save_pretrained(output / "text_tokenizer")
    part = output / "documents.txt.part"
    with part.open("w", encoding="utf-8") as file:
        for index in progress(range(documents), "documents", documents):
            file.write(document(scenes, index) + "\n\n")
    part.replace(output / "documents.txt")


def document(scenes: Scenes, index: int) -> str:
    """The texts of a scene, one a line; what a line says helps to foretell the next, which is reading."""
    scene, random = scenes.scene(index), Random(f"document {scenes.seed} {index}")
    captions = random.sample(scenes.captions(index, scene), 3)
    lines = [f"{CAPTION_PROMPT} {text}" if random.random() < PROMPTED else text for text in captions]
    lines += [f"{QUESTION_PROMPT.format(item.question)} {item.answer}" for item in scenes.questions(index, scene)]
    random.shuffle(lines)
    return "\n".join(lines)


def train_byte_tokenizer(texts: Iterable[str], vocab_size: int) -> GPT2Tokenizer:
    """Byte-level BPE with OPT's special ids, `</s>` in front of every text as OPT has it; `<image>` is the last id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # `<image>` follows
        special_tokens=[BOS, PAD, EOS, UNK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # a small vocabulary of things has fewer words than there are rows: what no text holds fills them
    unused = [AddedToken(f"<unused{i}>") for i in range(vocab_size - 1 - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([*unused, AddedToken(IMAGE, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A {EOS} $B", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return GPT2Tokenizer(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD, unk_token=UNK)


def word_tokenizer(lexicon: Lexicon, vocab_size: int, directory: Path) -> BertTokenizer:
    """BERT's WordPiece over the words of the scenes and, for all others, single letters."""
    words = list(dict.fromkeys([*SPECIAL, *lexicon.vocabulary(), *LETTERS, *(f"##{letter}" for letter in LETTERS)]))
    if len(words) > vocab_size:
        raise InputError(f"{len(words)} words do not fit into --vocab-size {vocab_size}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    return BertTokenizer.from_pretrained(directory, bos_token="[DEC]", local_files_only=True)


def _sample(scenes: Scenes) -> Iterator[str]:
    """Every word a few times, as texts have them, and real texts, so that whole words win."""
    for word in scenes.sprites.lexicon.vocabulary():
        yield f"{word} {word} {word} {word}"
    for index in range(SAMPLE):
        yield document(scenes, index)


if __name__ == "__main__":
    sys.exit(main())
