"""What BLIP-2 is trained with, as plain functions of the reference model (BLIP-2 paper, sections 3.2 and 3.3).

Stage 1 aligns pictures and texts in three ways: in one space (ITC), as pairs that match or do not (ITM), and by writing
the text (ITG). Stage 2 teaches the queries to prompt a frozen language model. Every loss is a mean over this process's
rows; with equal batches, the mean of the processes' gradients is the gradient of the joined batch.

Texts are padded at their end: ids [B, L], mask [B, L], True for tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..stages import MASKED
from .blip2 import Blip2
from .config import T5Config
from .gather import first_row, gather, gather_with_gradient
from .opt import OPT
from .retrieval import Blip2Retrieval
from .t5 import T5Decoder

IGNORED = -100  # a label that no loss counts
LABEL_SMOOTHING = 0.1  # of ITC and ITG in LAVIS; neither ITM nor stage 2 smooths


class Similarities(NamedTuple):
    """Cosines over the temperature, each [B, W*B]: this process's rows against all processes' columns.

    `same` [B, W*B] says which belong together.
    """

    image_to_text: Tensor
    text_to_image: Tensor
    same: Tensor


def additive_mask(mask: Tensor, like: Tensor) -> Tensor:
    """True for what is seen, [B, L] -> what is added to attention scores, [B, 1, 1, L], on the device of `like`."""
    return _additive(mask, like)[:, None, None]


def itc_similarities(
    image_itc: Tensor, text_itc: Tensor, temperature: Tensor, image_ids: Tensor | None = None
) -> Similarities:
    """Compare pictures and texts of all processes: a pair's similarity is that of its best query.

    The gathered side carries no gradient, in one process neither: this is how LAVIS trains.

    Args:
        image_itc: unit vectors [B, Q, E].
        text_itc: unit vectors [B, E]; row i belongs to picture i.
        temperature: [].
        image_ids: int64 [B]: rows of one id belong together too, as captions of one picture do. None: all differ.
    """
    rows = len(image_itc)
    ids = torch.arange(rows, device=image_itc.device) + first_row(rows) if image_ids is None else image_ids
    image_to_text = torch.einsum("iqe,te->itq", image_itc, gather(text_itc)).amax(2) / temperature  # [B, W*B]
    text_to_image = torch.einsum("te,iqe->tiq", text_itc, gather(image_itc)).amax(2) / temperature  # [B, W*B]
    return Similarities(image_to_text, text_to_image, ids[:, None] == gather(ids)[None])


def itc_loss(similarities: Similarities, label_smoothing: float = LABEL_SMOOTHING) -> Tensor:
    """Image-text contrastive loss, the mean of both directions."""
    same = similarities.same.to(similarities.image_to_text.dtype)
    targets = same / same.sum(1, keepdim=True)
    return sum(
        0.5 * F.cross_entropy(scores, targets, label_smoothing=label_smoothing)
        for scores in (similarities.image_to_text, similarities.text_to_image)
    )  # type: ignore[return-value]


@torch.no_grad()
def draw_negatives(similarities: Similarities, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Hard negatives: the more alike, the likelier drawn.

    Returns:
        A picture for each text and a text for each picture, int64 [B] each, as rows of the gathered batch.
    """
    image_to_text, text_to_image = (
        # where similarities are no numbers the losses say so, and multinomial would only say that it cannot draw
        scores.float().masked_fill(similarities.same, -10000).softmax(1).nan_to_num(1)
        for scores in (similarities.image_to_text, similarities.text_to_image)
    )
    images = torch.multinomial(text_to_image, 1, generator=generator)[:, 0]
    texts = torch.multinomial(image_to_text, 1, generator=generator)[:, 0]
    return images, texts


def itm_loss(
    model: Blip2Retrieval, image_embeds: Tensor, text_ids: Tensor, text_mask: Tensor, negatives: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Image-text matching loss over positives, texts with a wrong picture, and pictures with a wrong text.

    Args:
        model: stage 1.
        image_embeds: [B, N+1, Dv].
        text_ids: [B, L]; all processes have the same L.
        text_mask: [B, L].
        negatives: what `draw_negatives` drew. Gradients flow into the pictures of other processes.

    Returns:
        The loss, and the logits [3B, 2] of the three kinds in this order.
    """
    wrong_image, wrong_text = negatives
    rows = len(image_embeds)
    images = torch.cat((image_embeds, gather_with_gradient(image_embeds)[wrong_image], image_embeds))
    ids = torch.cat((text_ids, text_ids, gather(text_ids)[wrong_text]))
    mask = torch.cat((text_mask, text_mask, gather(text_mask)[wrong_text]))
    _, logits = model.itm(images, ids, additive_mask(mask, images))  # [3B, Q, 2]
    logits = logits.mean(1)
    labels = torch.arange(3 * rows, device=logits.device) < rows
    return F.cross_entropy(logits, labels.long()), logits


def itg_loss(
    model: Blip2Retrieval, image_embeds: Tensor, text_ids: Tensor, text_mask: Tensor, decode_id: int
) -> Tensor:
    """Image-grounded text generation loss: every token of the text but the first, from the picture and those before it.

    `decode_id`, [DEC] of BERT's tokenizer, takes the place of [CLS], so that a text which is written can be told from
    one which is read.
    """
    ids = torch.cat((torch.full_like(text_ids[:, :1], decode_id), text_ids[:, 1:]), dim=1)
    logits = model.itg_logits(image_embeds, ids, additive_mask(text_mask, image_embeds))  # [B, L, V]
    labels = ids.masked_fill(~text_mask, IGNORED)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=LABEL_SMOOTHING)


def mask_prompt(text_ids: Tensor, text_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Labels [B, T] of texts whose first tokens, `prompt_lengths` [B] of them, are given and not to be learnt."""
    given = torch.arange(text_ids.shape[1], device=text_ids.device) < prompt_lengths[:, None]
    return text_ids.masked_fill(given | ~text_mask, IGNORED)


def opt_loss(
    decoder: OPT, prefix: Tensor | None, text_ids: Tensor, labels: Tensor, owner: Tensor | None = None
) -> Tensor:
    """Language modelling loss of a decoder-only language model behind the picture.

    All texts of a picture stand in one row behind it, as branches of one tree: each sees the picture and itself.

    Args:
        decoder: OPT.
        prefix: [B, Q, D], or None: text alone, whose first token then is no label.
        text_ids: [R, T], BOS first.
        labels: [R, T], `IGNORED` where the loss does not count; `mask_prompt` makes them. What stands behind a text's
            last label is left out.
        owner: [R], the picture of each text, in rising order; None: text i stands behind picture i.
    """
    device, labelled = labels.device, labels != IGNORED
    owner = torch.arange(len(labels), device=device) if owner is None else owner
    branch, depth = labelled.flip(1).cumsum(1).flip(1).nonzero(as_tuple=True)  # of every token up to the last label
    picture = owner[branch]
    counts = torch.bincount(picture, minlength=int(owner[-1]) + 1)
    place = torch.arange(len(branch), device=device) - (counts.cumsum(0) - counts)[picture]  # among the picture's
    shape = (len(counts), int(counts.max()))
    queries = prefix.shape[1] if prefix is not None else 0
    if prefix is None:
        prefix = decoder.embedding.token.weight.new_zeros(len(counts), 0, decoder.embedding.token.embedding_dim)

    def lay(values: Tensor, fill: int) -> Tensor:
        """Values of every token as [B, P]; `fill` behind each picture's last."""
        laid = torch.full(shape, fill, device=device)
        laid[picture, place] = values
        return laid

    query_rows = torch.arange(queries, device=device).expand(len(counts), -1)
    ids = torch.cat((torch.full_like(query_rows, -1), lay(text_ids[branch, depth], 0)), dim=1)  # [B, Q+P]
    positions = torch.cat((query_rows, lay(queries + depth, 0)), dim=1)
    branches = torch.cat((torch.full_like(query_rows, -1), lay(branch, -2)), dim=1)
    is_seen = (branches[:, None, :] == branches[:, :, None]) | (branches[:, None, :] == -1)
    rows = torch.arange(queries + shape[1], device=device)
    mask = _additive((is_seen & (rows[None, :] <= rows[:, None]))[:, None], prefix)  # [B, 1, Q+P, Q+P]
    # each token is predicted by the one before it, the first of a text by the picture's last row
    before = torch.where(depth > 0, queries + place - 1, max(queries - 1, 0))
    seen_labels = labels[branch, depth].masked_fill((depth == 0) & (queries == 0), IGNORED)
    logits, *_ = decoder(
        F.pad(prefix, (0, 0, 0, shape[1])),
        ids,
        positions,
        rows.new_zeros(len(counts)),
        mask,
        lay(before, 0),
        *[None] * (2 * len(decoder.blocks)),
    )
    return _token_loss(logits, lay(seen_labels, IGNORED))


def t5_loss(
    model: Blip2, prefix: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, output_ids: Tensor, output_mask: Tensor
) -> Tensor:
    """Prefix language modelling loss: the encoder reads picture and prompt, the decoder writes the output.

    Args:
        model: BLIP-2 with T5.
        prefix: [B, Q, D].
        prompt_ids: [B, P], with their end token.
        prompt_mask: [B, P].
        output_ids: [B, T], with their end token.
        output_mask: [B, T].
    """
    decoder, config = model.decoder, model.config.text
    assert isinstance(decoder, T5Decoder)
    assert isinstance(config, T5Config)
    (count, queries), length = prefix.shape[:2], prompt_ids.shape[1]
    ids = torch.cat((prompt_ids.new_full((count, queries), -1), prompt_ids), dim=1)  # [B, Q+P]
    seen = F.pad(prompt_mask, (queries, 0), value=True)
    encoder_mask = additive_mask(seen, prefix)
    rows = torch.arange(queries + length, device=ids.device).expand(count, -1)
    cross = model.encoder(F.pad(prefix, (0, 0, 0, length)), ids, rows, encoder_mask)
    start = output_ids.new_full((count, 1), config.start_token_id or 0)
    given = torch.cat((start, output_ids[:, :-1]), dim=1)  # [B, T]
    depths = torch.arange(given.shape[1], device=ids.device).expand(count, -1)
    logits, *_ = decoder(
        given,
        depths,
        depths,
        depths[:, 0],
        _causal_mask(given.shape[1], prefix),
        encoder_mask,
        depths,
        *[None] * len(cross),
        *cross,
    )
    return _token_loss(logits, output_ids.masked_fill(~output_mask, IGNORED))


def _causal_mask(length: int, like: Tensor) -> Tensor:
    """[1, 1, S, S]: a row sees itself and those before it."""
    return _additive(torch.ones(length, length, dtype=torch.bool, device=like.device).tril(), like)[None, None]


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)  # bf16 does not hold MASKED
    return torch.zeros(mask.shape, dtype=dtype, device=like.device).masked_fill(~mask, MASKED)


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, R, V] over the labels [B, R] that count."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
