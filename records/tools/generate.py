"""What a model says: continues a prompt, token by token, until the document ends or --tokens are there.

python records/tools/generate.py logs/<run>/model.ptz "The city of" --temperature 0.8 --top-k 40 --seed 1
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece as spm
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as tg


@torch.inference_mode()
def next_logits(model: tg.GPT, ids: list[int]) -> Tensor:
    """float32 logits [V] of the token that follows."""
    head = getattr(model, "lm_head", model.tok_emb)
    last = model.hidden(torch.tensor([ids], device=head.device), model.scoring)[0][0, -1].float()
    return (model.softcap * torch.tanh(head.float() @ last / model.softcap)).cpu()


def draw(logits: Tensor, temperature: float, top_k: int, random: torch.Generator) -> int:
    """A token of softmax(logits / temperature), of the `top_k` likeliest (0: of all); at 0 the likeliest."""
    if not temperature:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, len(logits))).values[-1], -math.inf
        )
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=random))


def generate(
    model: tg.GPT, context: int, ids: list[int], options: argparse.Namespace
) -> Iterator[int]:
    """Tokens behind `ids`, each from at most `context` before it; ends in front of a new document."""
    ids, first = list(ids), ids[0]
    random = torch.Generator().manual_seed(options.seed)
    for _ in range(options.tokens):
        token = draw(next_logits(model, ids[-context:]), options.temperature, options.top_k, random)
        if token == first:
            return
        ids.append(token)
        yield token


def stream(
    tokenizer: spm.SentencePieceProcessor, ids: list[int], tokens: Iterator[int]
) -> Iterator[str]:
    """Text as it grows. What ends inside a character waits for the rest of it."""
    shown = tokenizer.decode(ids)
    yield shown
    for token in tokens:
        ids = [*ids, token]
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("artifact", type=Path)
    top.add_argument("prompt", nargs="?", default="")
    top.add_argument("--tokens", type=int, default=200)
    top.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    top.add_argument("--top-k", type=int, default=40, help="0: all tokens")
    top.add_argument("--seed", type=int, default=1337)
    top.add_argument("--tokenizer", type=Path, default=ROOT / tg.Config().tokenizer_path)
    return top


def main() -> int:
    options = parser().parse_args()
    try:
        if options.temperature < 0 or options.top_k < 0:
            raise tg.InputError(
                f"--temperature {options.temperature} --top-k {options.top_k}: 0 or more"
            )
        model, architecture, _ = tg.load_model(options.artifact.read_bytes(), str(options.artifact))
        tg.ByteCounter.from_sentencepiece(
            options.tokenizer, architecture.vocab_size
        )  # the model's size
    except (OSError, tg.InputError) as error:
        print(error, file=sys.stderr)
        return tg.EXIT_INPUT
    tokenizer = spm.SentencePieceProcessor(model_file=str(options.tokenizer))
    ids = [tokenizer.bos_id(), *tokenizer.encode(options.prompt)]
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    for text in stream(tokenizer, ids, generate(model, architecture.train_seq_len, ids, options)):
        print(text, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
