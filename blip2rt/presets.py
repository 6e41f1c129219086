"""The papers' and mmpretrain's protocols by name, each with the number that was published and where.

A preset says what an engine has to be (`problems`), how it is exported (`export_command`) and how it is asked. Prompts,
lengths and penalties are those of the source; `rules="lavis"` because all of them ran on transformers 4.33 or older.
"""

import difflib
from dataclasses import dataclass, field
from typing import Any

from .data.cleaning import clean_question
from .errors import InputError
from .manifest import GENERATIVE, RETRIEVAL, Manifest
from .options import GenerationOptions

PAPER = "BLIP-2, arXiv 2301.12597v3"
CAPTION, VQA, RETRIEVE = "caption", "vqa", "retrieval"


@dataclass(frozen=True)
class Preset:
    """One row of a table. `published`: percent, CIDEr and the other caption metrics times 100."""

    name: str
    task: str
    data_set: str
    split: str
    config: str  # what the engine is exported with: a name for --config
    checkpoint: str  # the published file; empty: nobody published it
    source: str
    published: dict[str, float]
    prompt: str = ""
    options: GenerationOptions = field(default_factory=GenerationOptions)
    rule: str = "official"  # of VQA accuracy
    style: str = "lavis"  # whose clean-up questions and captions go through: "lavis" or "mmpretrain"
    prompt_tokens: int | None = None  # a prompt is cut to as many, its BOS included; None: never
    lemmatizes: bool = False  # answers are lemmatised before they are scored
    vision_layers: int | None = None  # None: all
    candidates: int = 128  # that ITM looks at
    text_length: int = 35  # tokens that retrieval texts are cut to
    image_size: int = 224  # side of the pictures in pixels
    reads_questions: bool = False  # the Q-Former is given the question as well

    @property
    def kind(self) -> str:
        """Of the engine."""
        return RETRIEVAL if self.task == RETRIEVE else GENERATIVE

    @property
    def language_model(self) -> str | None:
        """Its size as configurations have it: the name of its family and its width."""
        for name, size in WIDTHS.items():
            if name in self.config:
                return size
        return None

    def export_command(self) -> str:
        """How the engine is made from the published file."""
        if self.reads_questions:
            return f"blip2rt export --model {self.checkpoint}"
        config, is_mmpretrain = self.config, self.style == "mmpretrain"
        options = ""
        if is_mmpretrain and self.image_size != 224:  # its files were trained with 224 px
            config, options = config.removesuffix(f"-{self.image_size}"), f" --image-size {self.image_size}"
        elif is_mmpretrain:  # its code interpolates them to the 364 px that the model is built for, and back
            options = " --via-image-size 364"
        command = f"blip2rt export --model {self.checkpoint or 'CHECKPOINT'} --config {config}{options}"
        if self.task == RETRIEVE:
            return f"{command} --text-tokenizer {BERT}"
        if not is_mmpretrain and not self.checkpoint.startswith("blip2_caption"):  # saved without the image encoder
            command += f" --vision {VISION['vitl' in self.config]}"
        return f"{command} --llm {next(llm for name, llm in LANGUAGE_MODELS.items() if name in self.config)}"

    def problems(self, manifest: Manifest) -> list[str]:
        """What keeps an engine from giving this row; none: it fits."""
        if manifest.kind != self.kind:
            return [f"it is a {manifest.kind} engine, not a {self.kind} one"]
        found, model = [], manifest.model
        if manifest.image.size != self.image_size:
            found.append(f"its pictures have {manifest.image.size} px, not {self.image_size}")
        if self.reads_questions and manifest.question_tokens is None:
            found.append("its Q-Former reads no questions")
        wanted = (self.vision_layers or (23 if "vitl" in self.config else 39), 1024 if "vitl" in self.config else 1408)
        layers, width = model["vision"]["num_hidden_layers"], model["vision"]["hidden_size"]
        if (layers, width) != wanted:
            found.append(f"its image encoder has {layers} blocks of width {width}, not {wanted[0]} of {wanted[1]}")
        if self.language_model:
            text = model["text"]
            size = f"t5-{text['d_model']}" if "d_model" in text else f"opt-{text['hidden_size']}"
            if size != self.language_model:
                found.append(f"its language model is {size}, not {self.language_model}")
        return found

    def ask(self, question: str) -> str:
        """The prompt of a question."""
        return self.prompt.format(clean_question(question, self.style))


LANGUAGE_MODELS = {
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "flan-t5-xxl": "google/flan-t5-xxl",
    "flan-t5-xl": "google/flan-t5-xl",
}
WIDTHS = {"opt-2.7b": "opt-2560", "opt-6.7b": "opt-4096", "flan-t5-xxl": "t5-4096", "flan-t5-xl": "t5-2048"}
BERT = "google-bert/bert-base-uncased"
UNPUBLISHED = ("opt-2.7b-vitl",)  # of the paper's stage-2 models
VISION = {False: "eva_vit_g.pth", True: "clip_vit_L.pth"}
OPT_PROMPT_TOKENS = 32  # LAVIS's max_txt_len: a longer question loses its "Answer:"; with T5 it cuts nothing
OPT_QUESTION, T5_QUESTION = "Question: {} Answer:", "Question: {} Short answer:"


def _options(**keywords: Any) -> GenerationOptions:
    return GenerationOptions(num_beams=5, rules="lavis", **keywords)


def _file(model: str) -> str:
    """LAVIS's file of a stage-2 model; "" where there is none."""
    if model in UNPUBLISHED:
        return ""
    short = model.replace("flan-t5-", "flant5").replace("opt-", "opt").replace("-vitl", "_vitL")
    return f"blip2_pretrained_{short}.pth"


def _paper_vqa() -> list[Preset]:
    """Zero-shot VQA: table 2. The answers of VQAv2's test-dev are not public: its rows give a submission."""
    numbers = {
        "opt-2.7b-vitl": (50.1, 49.7, 30.2, 33.9),
        "opt-2.7b": (53.5, 52.3, 31.7, 34.6),
        "opt-6.7b": (54.3, 52.6, 36.4, 36.4),
        "flan-t5-xl-vitl": (62.6, 62.3, 39.4, 44.4),
        "flan-t5-xl": (63.1, 63.0, 40.7, 44.2),
        "flan-t5-xxl": (65.2, 65.0, 45.9, 44.7),
    }
    tables = (("vqav2", "val"), ("vqav2", "testdev"), ("okvqa", "val"), ("gqa", "testdev"))
    return [
        Preset(
            name=f"paper-{data_set}{'-testdev' if (data_set, split) == tables[1] else ''}-{model}",
            task=VQA,
            data_set=data_set,
            split=split,
            config=f"blip2-{model}",
            checkpoint=_file(model),
            source=f"{PAPER}, table 2",
            published={"accuracy": number},
            prompt=OPT_QUESTION if "opt" in model else T5_QUESTION,
            options=_options(max_new_tokens=10, length_penalty=-1.0),
            prompt_tokens=OPT_PROMPT_TOKENS if "opt" in model else None,
            lemmatizes=data_set == "okvqa",
        )
        for model, row in numbers.items()
        for (data_set, split), number in zip(tables, row, strict=True)
    ]


def _paper_finetuned_vqa() -> list[Preset]:
    """VQA after fine-tuning, where the Q-Former reads the question: table 4. Nobody published these models."""
    numbers = {"opt-2.7b": (81.59, 81.74), "opt-6.7b": (82.19, 82.30), "flan-t5-xl": (81.55, 81.66)}
    return [
        Preset(
            name=f"paper-vqav2-finetuned-{model}",
            task=VQA,
            data_set="vqav2",
            split="testdev",
            config=f"blip2-{model}",
            checkpoint="runs/vqa/checkpoint",
            source=f"{PAPER}, table 4; beams of its appendix, lengths of table 2's",
            published={"accuracy": accuracy, "accuracy, test-std": standard},
            prompt=OPT_QUESTION if "opt" in model else T5_QUESTION,
            options=_options(max_new_tokens=10, length_penalty=-1.0),
            image_size=490,
            reads_questions=True,
        )
        for model, (accuracy, standard) in numbers.items()
    ]


def _paper_captions() -> list[Preset]:
    """Captions after fine-tuning on COCO, and the same models on NoCaps: table 3. LAVIS counts OPT's start token."""
    numbers = {
        "opt-2.7b": ({"Bleu_4": 43.7, "CIDEr": 145.8}, {"CIDEr": 119.7, "SPICE": 15.4}),
        "opt-6.7b": ({"Bleu_4": 43.5, "CIDEr": 145.2}, {"CIDEr": 121.0, "SPICE": 15.3}),
        "flan-t5-xl": ({"Bleu_4": 42.4, "CIDEr": 144.5}, {"CIDEr": 121.6, "SPICE": 15.8}),
    }
    return [
        Preset(
            name=f"paper-{data_set}-caption-{model}",
            task=CAPTION,
            data_set=data_set,
            split="test" if data_set == "coco" else "val",
            config=f"blip2-{model}-364",
            image_size=364,
            checkpoint=_file(model).replace("pretrained", "caption"),
            source=f"{PAPER}, table 3; lengths of LAVIS's caption_coco_ft configuration",
            published=published,
            prompt="a photo of",
            # LAVIS's min_length counts the start token of either, its max_length that of OPT
            options=_options(max_new_tokens=29 if "opt" in model else 30, min_new_tokens=7),
        )
        for model, row in numbers.items()
        for data_set, published in zip(("coco", "nocaps"), row, strict=True)
    ]


def _paper_retrieval() -> list[Preset]:
    """Retrieval with the models that were fine-tuned on COCO: table 5."""
    names = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10")
    numbers = {
        ("coco", ""): (85.4, 97.0, 98.5, 68.3, 87.7, 92.6),
        ("coco", "-vitl"): (83.5, 96.0, 98.0, 66.3, 86.5, 91.8),
        ("flickr30k", ""): (97.6, 100.0, 100.0, 89.7, 98.1, 98.9),
        ("flickr30k", "-vitl"): (96.9, 100.0, 100.0, 88.6, 97.6, 98.9),
    }
    return [
        Preset(
            name=f"paper-{data_set}-retrieval{vision}",
            task=RETRIEVE,
            data_set=data_set,
            split="test",
            config=f"blip2{vision}-364",
            image_size=364,
            checkpoint="" if vision else "blip2_finetune_coco.pth",
            source=f"{PAPER}, table 5",
            published=dict(zip(names, row, strict=True)),
        )
        for (data_set, vision), row in numbers.items()
    ]


def _lavis() -> list[Preset]:
    """What the headers of LAVIS's evaluation configurations say that they gave."""
    vqa = {
        "vqav2-opt-2.7b": ({"accuracy": 51.88}, "vqav2_zeroshot_opt_eval"),
        "vqav2-flan-t5-xl": (
            {"accuracy": 63.13, "accuracy, yes/no": 84.28, "accuracy, number": 41.01, "accuracy, other": 52.90},
            "vqav2_zeroshot_flant5xl_eval",
        ),
        "okvqa-flan-t5-xl": ({"accuracy": 41.22}, "okvqa_zeroshot_flant5xl_eval"),
        "gqa-flan-t5-xl": ({"accuracy": 43.98}, "gqa_zeroshot_flant5xl_eval"),
    }
    captions = {
        "opt-2.7b": {
            "Bleu_1": 83.2, "Bleu_2": 69.1, "Bleu_3": 55.6, "Bleu_4": 43.8, "METEOR": 31.7, "ROUGE_L": 62.0,
            "CIDEr": 146.1, "SPICE": 25.2,
        },
        "opt-6.7b": {"Bleu_4": 43.4, "CIDEr": 145.1, "SPICE": 25.1},
    }  # fmt: skip
    presets = [
        Preset(
            name=f"lavis-coco-caption-{model}",
            task=CAPTION,
            data_set="coco",
            split="test",
            config=f"blip2-{model}-364",
            image_size=364,
            checkpoint=_file(model).replace("pretrained", "caption"),
            source=f"LAVIS, caption_coco_{model.replace('-', '')}_eval.yaml (its header)",
            published=published,
            prompt="a photo of",
            options=_options(max_new_tokens=29, min_new_tokens=7),  # max_len 30, min_len 8, the start token counts
        )
        for model, published in captions.items()
    ]
    for name, (published, file) in vqa.items():
        data_set, _, model = name.partition("-")
        is_opt = "opt" in model
        presets.append(
            Preset(
                name=f"lavis-{name}",
                task=VQA,
                data_set=data_set,
                split="testdev" if data_set == "gqa" else "val",
                config=f"blip2-{model}",
                checkpoint=_file(model),
                source=f"LAVIS, {file}.yaml (its header)",
                published=published,
                prompt=T5_QUESTION,
                options=_options(max_new_tokens=10, length_penalty=0.0 if is_opt else -1.0),
                rule="lavis",
                prompt_tokens=OPT_PROMPT_TOKENS if is_opt else None,
                lemmatizes=data_set == "okvqa",
            )
        )
    return presets


MMPRETRAIN = "mmpretrain, configs/blip2 (its README and metafile)"
MMPRETRAIN_OPT = "blip2-opt2.7b_3rdparty_pretrain_20230505-b51db4e1.pth"  # captions and answers
MMPRETRAIN_ROWS = [
    Preset(
        name="mmpretrain-caption-opt-2.7b",
        task=CAPTION, data_set="coco", split="val", config="blip2-opt-2.7b-364", image_size=364, vision_layers=38,
        checkpoint=MMPRETRAIN_OPT, source=MMPRETRAIN,
        published={"Bleu_4": 32.90, "CIDEr": 111.10}, prompt="a photo of", options=_options(max_new_tokens=30),
        style="mmpretrain",
    ),
    Preset(
        name="mmpretrain-vqav2-opt-2.7b",
        task=VQA, data_set="vqav2", split="val", config="blip2-opt-2.7b", vision_layers=38,
        checkpoint=MMPRETRAIN_OPT, source=MMPRETRAIN, published={"accuracy": 53.50},
        prompt=OPT_QUESTION, options=_options(max_new_tokens=10, length_penalty=-1.0), rule="mmpretrain",
        style="mmpretrain",
    ),
    Preset(
        name="mmpretrain-coco-retrieval",
        task=RETRIEVE, data_set="coco", split="val", config="blip2-364", image_size=364,
        checkpoint="blip2_3rdparty_pretrain_20230505-f7ef4390.pth", source=MMPRETRAIN,
        published={"txt_r1": 85.40, "img_r1": 68.30}, style="mmpretrain",
    ),
]  # fmt: skip
PAPER_ROWS = (*_paper_vqa(), *_paper_finetuned_vqa(), *_paper_captions(), *_paper_retrieval())
PRESETS = {preset.name: preset for preset in (*PAPER_ROWS, *_lavis(), *MMPRETRAIN_ROWS)}


def find_preset(name: str) -> Preset:
    """A preset by its name.

    Raises:
        InputError: there is none; it suggests the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise InputError(f"there is no preset {name!r}; did you mean {nearest!r}? All: {', '.join(PRESETS)}")
