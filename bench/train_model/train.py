"""Train the bundled model on CPU: python -m bench.train_model.train --run DIR. Resumable; see README.md here.

A control.json in the run's directory changes the mixture and the rates while it runs, and asks for a checkpoint to
ship: {"decay_tokens": N, "name": "first"} decays the rates to zero over N tokens, exports, and goes on from before.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from amem.bench.world import examples
from bench.train_model.curriculum import LADDER, Curriculum
from bench.train_model.data import BUCKETS, Batch, Mix, Row, batches, collate
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
        self.mix = Mix()
        self.decay_start, self.decay_tokens, self.shipped = -1, 0, ""
        self.file = args.run / "state.pt"
        source = self.file if self.file.exists() else args.start
        if source:
            self.load(source)

    def load(self, source: Path) -> None:
        state = torch.load(source, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        levels = state["curriculum"]
        self.curriculum.levels, self.curriculum.accuracy = levels.levels, levels.accuracy
        for name in ("step", "tokens", "seconds"):
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
        self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def average_gradients(self) -> None:
        """Mean over the workers, in one flat all-reduce."""
        if self.args.world == 1:
            return
        grads = [p.grad for p in self.model.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.args.world
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))

    def total(self, values: list[float]) -> list[float]:
        """Sum of each value over the workers."""
        if self.args.world == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def rate(self) -> float:
        """Warm-up, then constant; linear to zero in a decay."""
        warm = min(1.0, (self.step + 1) / 150)
        if self.decay_start < 0:
            return warm
        return warm * max(0.0, 1 - (self.tokens - self.decay_start) / self.decay_tokens)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of held-out first askings answered exactly, per active task at its level."""
        out, n = {}, 48 // self.args.world
        seed = 10_000 + self.step * self.args.world + self.args.rank
        for task in self.curriculum.active():
            level = replace(LADDER[self.curriculum.levels[task]], turns=1, pool=self.encoder.pool())
            split = "heldout" if level.pieces > 1 else "train"
            prompts = [self.encoder.prompt(e) for e in examples(task, split, seed, n, level)]
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
            out[task] = right / n / self.args.world
        return dict(zip(out, self.total(list(out.values())), strict=True))

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
        if self.decay_start < 0:
            self.curriculum.update(accuracy)
        if self.args.rank == 0:
            print(json.dumps(line), flush=True)
            with (self.args.run / "log.jsonl").open("a") as f:
                f.write(json.dumps(line) + "\n")
            if self.decay_start < 0:
                self.save()

    def control(self) -> None:
        """Take over what control.json in the run's directory says: shares of the mixture, rates, a decay to ship."""
        file = self.args.run / "control.json"
        said = [json.loads(file.read_text()) if file.exists() else {}]
        if self.args.world > 1:
            dist.broadcast_object_list(said, 0)
        for name, value in said[0].items():
            if name in ("copies", "long"):
                setattr(self.mix, name, value)
            elif name in ("lr", "adam_lr", "stop"):
                setattr(self.args, name, value)
        ship = int(said[0].get("decay_tokens", 0))
        if ship and self.decay_start < 0 and str(said[0]["name"]) != self.shipped:
            self.shipped = str(said[0]["name"])
            self.decay_start, self.decay_tokens = self.tokens, ship

    def ship(self) -> None:
        """End a decay: export the model, then go on from the weights before the decay."""
        accuracy = self.evaluate()
        if self.args.rank == 0:
            target = self.args.run / f"export-{self.shipped}"
            target.mkdir(exist_ok=True)
            export(self.model, target)
            print(json.dumps({"exported": self.shipped, "tokens": self.tokens, "accuracy": accuracy}), flush=True)
        self.decay_start = -1
        self.load(self.file)

    def run(self) -> None:
        a = self.args
        self.control()
        seed = f"{a.seed}/{self.step}/{a.rank}"
        source = batches(self.curriculum, self.encoder, self.model.shape.vocabulary - 14, seed, a.batch, self.mix)
        clock, since, losses = time.time(), 0, []
        while self.tokens < a.stop:
            rate = self.rate()
            for optimizer, lr in ((self.muon, a.lr), (self.adam, a.adam_lr)):
                optimizer.param_groups[0]["lr"] = lr * rate
            batch = next(source)
            losses.append(self.train_batch(batch))
            self.step += 1
            tokens = int(self.total([batch.tokens])[0])
            self.tokens += tokens
            since += tokens
            if self.decay_start >= 0 and self.tokens - self.decay_start >= self.decay_tokens:
                self.ship()
            if self.tokens - self.last_eval >= a.every:
                spent = time.time() - clock
                self.seconds += spent
                self.report(sum(losses) / len(losses), since / spent)
                self.control()
                clock, since, losses, self.last_eval = time.time(), 0, [], self.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="checkpoint to start from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--init", choices=("recall", "random"), default="recall")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--every", type=int, default=400_000)
    parser.add_argument("--stop", type=int, default=200_000_000)
    parser.add_argument("--rank", type=int, default=0, help="this worker's number, of --world")
    parser.add_argument("--world", type=int, default=1, help="workers that train together, started by hand")
    parser.add_argument("--rendezvous", type=Path, help="a new file through which the workers find each other")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 4 * len(BUCKETS)
    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / "arguments.json").write_text(json.dumps({k: str(v) for k, v in vars(args).items()}, indent=2))
    if args.world > 1:
        store = f"file://{args.rendezvous}"
        dist.init_process_group("gloo", init_method=store, rank=args.rank, world_size=args.world)
    trainer = Trainer(args)
    print(json.dumps(asdict(trainer.model.shape)), sum(p.numel() for p in trainer.model.parameters()), flush=True)
    trainer.run()


if __name__ == "__main__":
    main()
