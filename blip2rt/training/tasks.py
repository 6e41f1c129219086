"""The stages as modules: batch in, losses out. What is wrapped for several processes is the task as a whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..model import Blip2, Blip2Retrieval
from ..model.objectives import (
    IGNORED,
    additive_mask,
    draw_negatives,
    itc_loss,
    itc_similarities,
    itg_loss,
    itm_loss,
    mask_prompt,
    opt_loss,
    t5_loss,
)
from ..model.opt import OPT
from ..model.qformer import CrossAttention, FeedForward, QFormerEmbedding, SelfAttention
from ..model.vision import VisionEncoder
from .texts import Batch

BACKGROUND_WEIGHT = 0.3  # most patches are background, and things matter more


class Task(nn.Module):
    """A model and its objective. `trained`: beginnings of the names of what learns, as the paper has it."""

    trained: tuple[str, ...]
    model: nn.Module

    def forward(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Losses by name, "loss" the one to minimise; `seed` is what random draws come from."""
        raise NotImplementedError

    def image_embeds(self, batch: Batch) -> Tensor:
        """After the vision norm, [B, N+1, Dv]; from pictures, or from what was cached of them."""
        vision: Any = self.model.vision
        if "image_features" in batch:
            return vision.norm(batch["image_features"])
        return vision(batch["pixel_values"])


class Contrastive(Task):
    """Stage 1, and fine-tuning for retrieval: ITC, ITM and ITG, unweighted."""

    trained = ("qformer", "text", "itm", "itg", "temperature", "vision.norm")

    def __init__(self, model: Blip2Retrieval, decode_id: int):
        super().__init__()
        self.model, self._decode_id = model, decode_id

    def forward(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        model: Any = self.model
        image_embeds = self.image_embeds(batch)
        ids, mask = batch["text_ids"], batch["text_mask"]
        _, image_itc = model.qformer(image_embeds)
        _, text_itc = model.text(ids, additive_mask(mask, image_embeds))
        similarities = itc_similarities(image_itc.float(), text_itc.float(), model.temperature, batch["image_ids"])
        generator = torch.Generator(ids.device).manual_seed(seed)
        itm, _ = itm_loss(model, image_embeds, ids, mask, draw_negatives(similarities, generator))
        losses = {
            "itc": itc_loss(similarities),
            "itm": itm,
            "itg": itg_loss(model, image_embeds, ids, mask, self._decode_id),
        }
        return {"loss": losses["itc"] + losses["itm"] + losses["itg"], **losses}


class Generative(Task):
    """Stage 2, captions and questions: the language model writes the text behind picture and prompt."""

    trained = ("qformer", "vision.norm")

    def __init__(self, model: Blip2):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        model: Any = self.model
        owner, image_embeds = batch["owner"], self.image_embeds(batch)
        if "question_ids" in batch:
            question_mask = additive_mask(batch["question_mask"], image_embeds)
            _, prefix = model.qformer(image_embeds[owner], batch["question_ids"], question_mask)  # [R, Q, D]
            owner = torch.arange(len(owner), device=owner.device)  # a picture for every question
        else:
            _, prefix = model.qformer(image_embeds)
        ids, mask, prompt_mask = batch["text_ids"], batch["text_mask"], batch["prompt_mask"]
        if isinstance(model.decoder, OPT):
            labels = mask_prompt(ids, mask, prompt_mask.sum(1))
            return {"loss": opt_loss(model.decoder, prefix, ids, labels, owner)}
        return {"loss": t5_loss(model, prefix[owner], batch["prompt_ids"], prompt_mask, ids, mask)}


class Language(Task):
    """A language model from scratch: the next token of documents."""

    trained = ("decoder",)

    def __init__(self, decoder: OPT):
        super().__init__()
        self.model = nn.ModuleDict({"decoder": decoder})

    def forward(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        labels = batch["text_ids"].masked_fill(~batch["text_mask"], IGNORED)
        decoder: Any = self.model.decoder
        return {"loss": opt_loss(decoder, None, batch["text_ids"], labels)}


class Vision(Task):
    """An image encoder from scratch: the class of every patch."""

    trained = ("vision", "head")

    def __init__(self, vision: VisionEncoder, num_classes: int):
        super().__init__()
        width = vision.norm.normalized_shape[0]
        self.model = nn.ModuleDict({"vision": vision, "head": nn.Linear(width, num_classes)})
        self._num_classes = num_classes

    def forward(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        head: Any = self.model.head
        logits, labels = (
            head(self.image_embeds(batch)[:, 1:]),
            batch["labels"],
        )  # [B, N, classes], without the class token
        weights = torch.where(batch["is_background"], BACKGROUND_WEIGHT, 1.0).flatten()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.05, reduction="none")
        hits = ((logits.argmax(2) == labels) & ~batch["is_background"]).sum() / (~batch["is_background"]).sum().clamp(
            min=1
        )
        return {"loss": (losses * weights).sum() / weights.sum(), "things": hits.detach()}


def freeze(task: Task, trained: tuple[str, ...]) -> list[str]:
    """Let what begins with one of these names learn, and nothing else; the beginnings that name nothing."""
    named = dict(task.model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(any(_is_below(name, prefix) for prefix in trained))
    return [prefix for prefix in trained if not any(_is_below(name, prefix) for name in named)]


def key_biases(task: Task) -> list[tuple[nn.Parameter, Tensor]]:
    """Biases of the image encoder that learn, and what their gradients are multiplied by: 0 for those of the keys.

    So these stay as they are: zero from the seed, as in every published model.

    Softmax cancels them, so that their gradients are rounding noise, of which Adam's division would make whole steps;
    and the formats of LAVIS and mmpretrain have no place for them.
    """
    found = []
    for name, parameter in task.model.named_parameters():
        if name.startswith("vision.") and name.endswith(".qkv.bias") and parameter.requires_grad:
            learns = torch.ones(parameter.shape, device=parameter.device)
            learns.chunk(3)[1].zero_()
            found.append((parameter, learns))
    return found


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix.removesuffix('.')}.")


def drop_out(task: Task, share: float) -> None:
    """Leave out a share of the Q-Former's embeddings, attention weights and layers' outputs, as BERT's training."""

    def dropped(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return F.dropout(output, share)

    for module in task.model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.dropout = share
            module.proj.register_forward_hook(dropped)
        elif isinstance(module, FeedForward):
            module.fc2.register_forward_hook(dropped)
        elif isinstance(module, QFormerEmbedding):
            module.register_forward_hook(dropped)


def named_blocks(task: Task) -> list[tuple[str, nn.Module]]:
    """The blocks of all the parts of a task's model."""
    return [(name, module) for name, module in task.model.named_modules() if name.rpartition(".")[0].endswith("blocks")]


def checkpoint_activations(task: Task) -> None:
    """Compute every block's activations again in the backward pass instead of keeping them."""
    for _, block in named_blocks(task):
        block.forward = _recomputing(block.forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: checkpoint(forward, *arguments, use_reentrant=False)
