"""Train the bundled model on CPU: python -m bench.train_model.train --run DIR [--decay-tokens N]. Resumable."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from amem.bench.world import examples
from bench.train_model.curriculum import LADDER, Curriculum
from bench.train_model.data import BUCKETS, Batch, Row, batches, collate
from bench.train_model.make_tokenizer import DEMO
from bench.train_model.model import Block, Llama, Shape, export, shape_for_recall
from bench.train_model.muon import Muon
from bench.train_model.prompts import Encoder


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.encoder = Encoder(DEMO)
        self.model = Llama(Shape())
        if args.init == "recall":
            shape_for_recall(self.model)
        self.compiled = torch.compile(Block.forward, dynamic=False)
        matrices = [p for b in self.model.blocks for p in b.parameters() if p.ndim == 2]
        rest = [self.model.embed, *(p for p in self.model.parameters() if p.ndim == 1)]
        self.muon = Muon(matrices, args.lr)
        self.adam = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.curriculum = Curriculum()
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.last_eval = 0
        self.file = args.run / "state.pt"
        source = self.file if self.file.exists() else args.start
        if source:
            self.load(source)

    def load(self, source: Path) -> None:
        state = torch.load(source, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        for name in ("curriculum", "step", "tokens", "seconds"):
            setattr(self, name, state[name])
        self.last_eval = self.tokens

    def save(self) -> None:
        names = ("curriculum", "step", "tokens", "seconds")
        state = {name: getattr(self, name) for name in names}
        for name in ("model", "muon", "adam"):
            state[name] = getattr(self, name).state_dict()
        torch.save(state, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").rename(self.file)

    def train_batch(self, batch: Batch) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.hidden(batch.ids, self.compiled).flatten(0, 1)[batch.picks]
            logits = self.model.logits(hidden).float()
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        loss = (losses * batch.weights).sum() / batch.weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def rate(self, start: int) -> float:
        """Warm-up, then constant; linear to zero over the last decay_tokens when asked to decay."""
        warm = min(1.0, (self.step + 1) / 150)
        if not self.args.decay_tokens:
            return warm
        return warm * max(0.0, 1 - (self.tokens - start) / self.args.decay_tokens)

    @torch.no_grad()
    def evaluate(self, n: int = 48) -> dict[str, float]:
        """Share of held-out first askings answered exactly, per active task at its level."""
        out = {}
        for task in self.curriculum.active():
            level = replace(LADDER[self.curriculum.levels[task]], turns=1, reverse=0.0)
            split = "heldout" if level.pieces > 1 else "train"
            prompts = [self.encoder.prompt(e) for e in examples(task, split, 10_000 + self.step, n, level)]
            rows = []
            for p in prompts:
                start, end = p.answers[0]
                rows.append(Row(p.ids[:end], [0.0] * start + [1.0] * (end - start)))
            rows.sort(key=lambda r: len(r.ids))
            right = 0
            for i in range(0, n, 24):
                part = rows[i : i + 24]
                batch = collate(part, len(part[-1].ids))
                with torch.autocast("cpu", torch.bfloat16):
                    hidden = self.model.hidden(batch.ids).flatten(0, 1)[batch.picks]
                    best = self.model.logits(hidden).argmax(-1)
                wrong = {int(r) for r in (batch.picks // batch.ids.shape[1])[best != batch.targets]}
                right += len(part) - len(wrong)
            out[task] = right / n
        return out

    def report(self, loss: float, speed: float) -> None:
        accuracy = self.evaluate()
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds),
            "loss": round(loss, 4),
            "speed": round(speed),
            "levels": {t: self.curriculum.levels[t] for t in accuracy},
            "accuracy": {t: round(a, 3) for t, a in accuracy.items()},
        }
        print(json.dumps(line), flush=True)
        with (self.args.run / "log.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")
        if not self.args.decay_tokens:
            self.curriculum.update(accuracy)
        self.save()

    def run(self) -> None:
        a = self.args
        start = self.tokens
        source: Iterator[Batch] | None = None
        clock, since, losses = time.time(), 0, []
        while self.tokens < a.stop and not (a.decay_tokens and self.tokens - start >= a.decay_tokens):
            if source is None:
                copies = 0.33 if self.tokens < a.copy_tokens else 0.02
                seed = f"{a.seed}/{self.step}"
                vocabulary = self.model.shape.vocabulary - 14
                source = batches(self.curriculum, self.encoder, vocabulary, seed, a.batch, copies)
            rate = self.rate(start)
            for optimizer, lr in ((self.muon, a.lr), (self.adam, a.adam_lr)):
                optimizer.param_groups[0]["lr"] = lr * rate
            batch = next(source)
            losses.append(self.train_batch(batch))
            self.step += 1
            self.tokens += batch.tokens
            since += batch.tokens
            if self.tokens - self.last_eval >= a.every:
                spent = time.time() - clock
                self.seconds += spent
                self.report(sum(losses) / len(losses), since / spent)
                clock, since, losses, self.last_eval, source = time.time(), 0, [], self.tokens, None
        self.report(sum(losses) / max(len(losses), 1), 0.0)
        if a.decay_tokens:
            export(self.model, a.run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="checkpoint to start from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--init", choices=("recall", "random"), default="recall")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--every", type=int, default=400_000)
    parser.add_argument("--copy-tokens", type=int, default=1_200_000)
    parser.add_argument("--stop", type=int, default=200_000_000)
    parser.add_argument("--decay-tokens", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 4 * len(BUCKETS)
    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / "arguments.json").write_text(json.dumps({k: str(v) for k, v in vars(args).items()}, indent=2))
    trainer = Trainer(args)
    print(json.dumps(asdict(trainer.model.shape)), sum(p.numel() for p in trainer.model.parameters()), flush=True)
    trainer.run()


if __name__ == "__main__":
    main()
