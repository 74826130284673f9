#!/usr/bin/env python3
"""What quantizers of K and V cost a model.

K and V of a context are rounded to what a page in some format would give back ("fake quantization"), in all
layers at once or in chosen KV heads; the tokens that follow are compared with the unquantized cache. Needs
PyTorch, and a GPU to be quick; reads llama-type GGUF files with F32, F16 and Q8_0 weights.

    python3 bench/quantizers.py -m MODEL -f TEXT [-c 8192] [--only 5:1,6:1,8:1] K+V [K+V ...]
    python3 bench/quantizers.py -m MODEL --suite SUITE.jsonl ...

K and V are BITS[.AXIS][.FIT][.OPTION...]: "16", or bits 8, 4, 3, 2 with
  AXIS  which values share scale and offset: channel (64 tokens of a page; usual for K), token (usual for V)
  FIT   minmax     the range of the values (usual)
        sNN        the range shrunk to NN percent, about its middle
        pNN        that or the whole range, whichever gives the smaller squared error
        clip       the range shrunk by the best of 16 factors, by squared error; fourth: by fourth powers
        lsq        least squares: codes and (scale, offset) in turn, from the range; best: from 8 shrunk ranges
        normal     Lloyd-Max levels of a normal distribution; trained: of this model's values (first context);
                   scale and offset by least squares
        rnormal, rtrained   the same levels between the smallest and the largest value
        free       levels of its own for every group: what no shared code book can beat
        symmetric  no offset: the largest magnitude decides
  OPTION had       a Hadamard rotation of the channels before, undone after; signs: with random signs
         balance   K's channels scaled before (undone after) so that queries and keys are equally large in each,
                   by the context's newest queries; wbalance: by the norms of the weights, per RoPE pair;
                   white: by the square root of the queries' second moment; krms, kstd, krange: by the keys alone,
                   so that each pair has the same mean square, variance or mean range over a page
         center    the page's mean of every channel subtracted before (f16), added after
         scale8    scales and offsets in 8 bits of the page's range of them instead of f16
         feedback  rounding errors are passed on to channels not yet rounded so that they cancel in what the value
                   is used for: q.k for the context's queries (K), the output projection of v (V)
         weighted  squared errors weigh by the attention that the token gets from the context's newest queries
         prerope   K is rotated back to position 0 before, and forth after
The first pair is what the others are divided by.
"""
import argparse
import json
import math
import re
import sys
from functools import lru_cache

import torch
import torch.nn.functional as F

from torch_model import Model, dev

PAGE, SINKS, WINDOW, OBSERVED = 64, 4, 28, 512


# ---- quantizers ------------------------------------------------------------------------------------------
def half(x):
    return x.clamp(-65504, 65504).half().float()


class Side:
    FITS = ("minmax", "clip", "fourth", "lsq", "best", "normal", "trained", "rnormal", "rtrained", "free", "symmetric")
    OPTIONS = ("had", "signs", "balance", "wbalance", "white", "krms", "kstd", "krange", "center", "scale8", "feedback",
               "weighted", "prerope")

    def __init__(self, text, axis):
        self.text, self.axis, self.fit, self.share, self.options = text, axis, "minmax", 1.0, set()
        bits, *words = text.split(".")
        self.bits = int(bits)
        for word in words:
            if word in ("channel", "token"):
                self.axis = word
            elif word in self.FITS:
                self.fit = word
            elif re.fullmatch(r"s\d\d", word):
                self.fit, self.share = "shrunk", int(word[1:]) / 100
            elif re.fullmatch(r"p\d\d", word):
                self.fit, self.share = "pick", int(word[1:]) / 100
            elif word in self.OPTIONS:
                self.options.add(word)
            else:
                sys.exit(f"quantizers: '{word}' is no part of a quantizer's name")

    def stored_bits(self, d):
        if self.bits == 16:
            return 16
        n = PAGE if self.axis == "channel" else d
        scales = 16 * 2**self.bits if self.fit == "free" else 16 if self.fit == "symmetric" else 32
        if "scale8" in self.options:
            scales = 16
        return self.bits + scales / n + (16 / PAGE if "center" in self.options else 0)


def round_to(levels, x, scale, offset):
    """Positions on the scale: the level nearest to each x."""
    step = (x - offset) / scale.clamp_min(1e-30)
    if levels is None:
        return step
    middle = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(step.contiguous(), middle)]


def fitted(x, levels, starts, rounds, w=None, power=2):
    """Least-squares scale and offset of groups x [..., n]; w: weights [..., n]."""
    last = levels[-1]
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    w = torch.ones_like(x) if w is None else w
    best = None
    for share in starts:
        scale, offset = half((high - low) * share / last), half((low + high) / 2 - (high - low) / 2 * share)
        for step in range(rounds + 1):
            s = round_to(levels, x, scale, offset)
            error = (w * (offset + scale * s - x).abs()**power).sum(-1, keepdim=True)
            if best is None:
                best = [error, scale, offset]
            else:
                better = error < best[0]
                best = [torch.where(better, new, old) for new, old in zip((error, scale, offset), best)]
            if step == rounds:
                break
            total, ms, mx = w.sum(-1, keepdim=True), (w * s).sum(-1, keepdim=True), (w * x).sum(-1, keepdim=True)
            ms, mx = ms / total, mx / total
            variance = (w * (s - ms)**2).sum(-1, keepdim=True)
            new = (w * (s - ms) * (x - mx)).sum(-1, keepdim=True) / variance.clamp_min(1e-30)
            ok = (variance > 0) & (new > 0)
            scale = torch.where(ok, half(new), scale)
            offset = torch.where(ok, half(mx - scale * ms), offset)
    return best[1], best[2]


def lloyd_max(x, bits, rounds=100):
    x = x.flatten().sort().values.double()
    total = F.pad(x.cumsum(0), (1, 0))
    n, count = x.numel(), 2**bits
    levels = x[((torch.arange(count, device=dev) + 0.5) / count * n).long()]
    for _ in range(rounds):
        cut = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edge = F.pad(cut, (1, 0))
        edge = torch.cat((edge, torch.tensor([n], device=dev)))
        count_in = (edge[1:] - edge[:-1]).clamp_min(1)
        levels = (total[edge[1:]] - total[edge[:-1]]) / count_in
    return ((levels - levels[0]) / (levels[-1] - levels[0]) * (count - 1)).float()


@lru_cache(None)
def normal_levels(bits):
    p = (torch.arange(200001, dtype=torch.float64, device=dev) + 0.5) / 200001
    return lloyd_max(torch.special.ndtri(p), bits)


SHRUNK = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44)


@lru_cache(None)
def hadamard(d):
    h = torch.ones(1, 1, device=dev)
    while h.shape[0] < d:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h / math.sqrt(d)


@lru_cache(None)
def random_signs(d):
    return torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(1)).to(dev) * 2.0 - 1


class Fake:
    """One side of the pages of all KV heads, rounded."""

    def __init__(self, side, trained):
        self.side, self.trained = side, trained

    def levels(self, groups):
        side = self.side
        if side.fit in ("normal", "rnormal"):
            return normal_levels(side.bits)
        if side.fit in ("trained", "rtrained"):
            key = (side.text, side.axis)
            if key not in self.trained:
                levels, some = normal_levels(side.bits), groups.flatten(0, -2)[::4]
                for _ in range(4):
                    if side.fit == "trained":
                        scale, offset = fitted(some, levels, SHRUNK, 4)
                    else:
                        scale, offset = fitted(some, levels, (1.0,), 0)
                    steps = (some - offset) / scale.clamp_min(1e-30)
                    levels = lloyd_max(steps, side.bits)
                self.trained[key] = levels
            return self.trained[key]
        return torch.arange(2**side.bits, device=dev, dtype=torch.float32)

    # x [heads, pages, 64, d]; factor [heads, d, d]; weight [heads, pages, 64]
    def __call__(self, x, factor, weight):
        side = self.side
        if side.bits == 16:
            return x
        mean = half(x.mean(2, keepdim=True)) if "center" in side.options else 0
        x = x - mean
        by_channel = side.axis == "channel"
        groups = x.transpose(2, 3) if by_channel else x
        levels = self.levels(groups)
        w = weight[:, :, None, :].expand_as(groups) if "weighted" in side.options and by_channel else None
        if side.fit == "free":
            n = groups.shape[-1]
            start = (torch.arange(2**side.bits, device=dev) + 0.5) / 2**side.bits * n
            own = groups.sort(-1).values[..., start.long()]
            for _ in range(30):
                code = (groups[..., None] - own[..., None, :]).abs().argmin(-1)
                one = F.one_hot(code, 2**side.bits).float()
                count = one.sum(-2)
                own = torch.where(count > 0, (one * groups[..., None]).sum(-2) / count.clamp_min(1), own)
            code = (groups[..., None] - own[..., None, :]).abs().argmin(-1)
            out = half(own).gather(-1, code)
            out = out.transpose(2, 3) if by_channel else out
        else:
            if side.fit == "symmetric":
                reach = 2**(side.bits - 1) - 0.5
                scale = half(groups.abs().amax(-1, keepdim=True) / reach)
                offset = -scale * reach
            elif side.fit in ("minmax", "rnormal", "rtrained"):
                scale, offset = fitted(groups, levels, (1.0,), 0)
            elif side.fit == "shrunk":
                scale, offset = fitted(groups, levels, (side.share,), 0)
            elif side.fit == "pick":
                scale, offset = fitted(groups, levels, (1.0, side.share), 0)
            elif side.fit in ("clip", "fourth"):
                starts = [1 - 0.04 * i for i in range(16)]
                scale, offset = fitted(groups, levels, starts, 0, w, 2 if side.fit == "clip" else 4)
            elif side.fit == "lsq":
                scale, offset = fitted(groups, levels, (1.0,), 4, w)
            else:
                scale, offset = fitted(groups, levels, SHRUNK, 6, w)
            if "scale8" in side.options:
                scale, offset = (self.coarse(t) for t in (scale, offset))
            scale = (scale.transpose(2, 3) if by_channel else scale).expand_as(x)
            offset = (offset.transpose(2, 3) if by_channel else offset).expand_as(x)
            if "feedback" in side.options:
                rest, out = x.clone(), torch.empty_like(x)
                for c in range(x.shape[-1]):
                    s, o = scale[..., c], offset[..., c]
                    out[..., c] = o + s * round_to(levels, rest[..., c], s, o)
                    error = (rest[..., c] - out[..., c]) / factor[:, None, None, c, c]
                    rest[..., c:] -= error[..., None] * factor[:, None, None, c, c:]
            else:
                out = offset + scale * round_to(levels, x, scale, offset)
        return out + mean

    @staticmethod
    def coarse(x):
        low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
        step = (high - low).clamp_min(1e-30) / 255
        return low + ((x - low) / step).round() * step


def feedback_factor(metric):
    """Upper triangular U with inv(H) = U' U, H damped; metric [heads, d, d]."""
    d = metric.shape[-1]
    h = metric.double()
    h = h + 0.01 * h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(d, device=dev)
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()


# ---- the study -------------------------------------------------------------------------------------------
class Method:
    def __init__(self, text):
        k, v = text.split("+")
        self.name, self.k, self.v = text, Side(k, "channel"), Side(v, "token")
        self.questions, self.l2 = [], []


def mark(tokenizer, tokens):
    """For each token: its question (from 0), and whether the token behind it is an answer's."""
    questions, answers, line, n, counted = [], [], "", -1, False
    pieces = [tokenizer.piece(t) for t in tokens]
    for i, piece in enumerate(pieces):
        if "\n" in piece:
            line, counted = piece[piece.rfind("\n") + 1:], False
        else:
            line += piece
        if not counted and line.startswith("Question"):
            counted, n = True, n + 1
        questions.append(max(n, 0))
        answers.append(line.startswith("Answer:") and i + 1 < len(pieces) and "\n" not in pieces[i + 1])
    return questions, answers


class Study:
    def __init__(self, model, only):
        self.model, self.only, self.trained = model, only, {}
        m = model
        self.v_metric = []
        for l in range(m.n_layers):
            wo = m.w[f"blk.{l}.attn_output.weight"].unflatten(1, (m.kv_heads, m.group, m.d))
            self.v_metric.append(torch.einsum("ehgi,ehgj->hij", wo, wo))

    def read(self, context, tails):
        m = self.model
        longest = max(map(len, tails))
        padded = torch.tensor([t + [0] * (longest - len(t)) for t in tails], device=dev)
        self.padded, self.lengths, n = padded, [len(t) for t in tails], len(context)
        x = m.w["token_embd.weight"][torch.tensor([context], device=dev)]
        y = m.w["token_embd.weight"][padded]
        self.embedded, self.layers = y, []
        for l in range(m.n_layers):
            q, k, v = m.qkv(l, x, 0)
            attention = torch.cat([
                F.scaled_dot_product_attention(q[:, h:h + 1], k[:, h // m.group:h // m.group + 1],
                                               v[:, h // m.group:h // m.group + 1], is_causal=True)
                for h in range(m.heads)
            ], 1)
            k, v = half(k[0]), half(v[0])
            observed = q[0, :, -OBSERVED:].unflatten(0, (m.kv_heads, m.group))
            weight = torch.einsum("hgmd,hnd->hgmn", observed, k) / math.sqrt(m.d)
            weight = weight.softmax(-1).mean((1, 2))  # [kv_heads, n]
            metric = torch.einsum("hgmi,hgmj->hij", observed, observed)
            tq, tk, tv = m.qkv(l, y, n)
            out = m.attend(tq, k, v, tk, tv)
            self.layers.append(dict(k=k, v=v, weight=weight, metric=metric, input=y, out=out))
            x, y = m.finish(l, x, attention), m.finish(l, y, out)
        self.reference = m.head(y).log_softmax(-1)

    def transform(self, l, keys, side):
        """Matrices [heads, d, d] that rows are multiplied by before and after."""
        m, layer = self.model, self.layers[l]
        turn = torch.eye(m.d, device=dev).repeat(m.kv_heads, 1, 1)
        if "balance" in side.options:
            q = layer["metric"].diagonal(dim1=1, dim2=2) / (OBSERVED * m.group)
            k = layer["k"].pow(2).mean(1)
            q, k = (t.unflatten(1, (-1, 2)).mean(2).repeat_interleave(2, 1) for t in (q, k))
            turn = torch.diag_embed((q / k)**0.25)
        if "wbalance" in side.options:
            q, k = (m.w[f"blk.{l}.attn_{s}.weight"].pow(2).sum(1).unflatten(0, (m.kv_heads, -1, m.d)).sum(1)
                    for s in "qk")
            q, k = (t.unflatten(1, (-1, 2)).mean(2).repeat_interleave(2, 1) for t in (q, k))
            turn = torch.diag_embed((q / k)**0.25)
        if "white" in side.options:
            metric = layer["metric"].double()
            metric = metric / metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            value, vector = torch.linalg.eigh(metric + 0.01 * torch.eye(m.d, device=dev))
            turn = (vector * value.sqrt()[:, None, :] @ vector.transpose(1, 2)).float()
        k = layer["k"]
        size = None
        if "krms" in side.options:
            size = k.pow(2).mean(1).sqrt()
        if "kstd" in side.options:
            size = k.std(1)
        if "krange" in side.options:
            pages = k[:, SINKS:SINKS + (k.shape[1] - SINKS) // PAGE * PAGE].unflatten(1, (-1, PAGE))
            size = (pages.amax(2) - pages.amin(2)).mean(1)
        if size is not None:
            size = size.unflatten(1, (-1, 2)).pow(2).mean(2).sqrt().repeat_interleave(2, 1)
            turn = torch.diag_embed(size.mean(1, keepdim=True) / size)
        if "signs" in side.options:
            turn = turn * random_signs(m.d)
        if "had" in side.options:
            turn = turn @ hadamard(m.d)
        return turn, torch.linalg.inv(turn.double()).float()

    def quantized(self, l, keys, side):
        m, layer = self.model, self.layers[l]
        x = layer["k" if keys else "v"]
        pages = max(0, x.shape[1] - SINKS - WINDOW) // PAGE
        end = SINKS + pages * PAGE
        if side.bits == 16 or pages == 0:
            return x
        y = m.rope(x, 0, back=True) if "prerope" in side.options else x
        body = y[:, SINKS:end].unflatten(1, (pages, PAGE))
        metric = layer["metric"] if keys else self.v_metric[l]
        turn, back = self.transform(l, keys, side)
        metric = back @ metric @ back.transpose(1, 2)
        factor = feedback_factor(metric) if "feedback" in side.options else None
        weight = layer["weight"][:, SINKS:end].unflatten(1, (pages, PAGE))
        weight = weight / weight.mean((1, 2), keepdim=True) + 0.05
        body = body @ turn[:, None]
        body = (Fake(side, self.trained)(body, factor, weight) @ back[:, None]).flatten(1, 2)
        if "prerope" in side.options:
            body = m.rope(body, SINKS)
        out = x.clone()
        for h in range(m.kv_heads):
            if not self.only or (l, h) in self.only:
                out[h, SINKS:end] = body[h]
        return out

    def measure(self, method, questions, answers):
        m, y = self.model, self.embedded
        n = self.layers[0]["k"].shape[1]
        for l, layer in enumerate(self.layers):
            k, v = self.quantized(l, True, method.k), self.quantized(l, False, method.v)
            out = m.attend(*(lambda q, a, b: (q, k, v, a, b))(*m.qkv(l, layer["input"], n)))
            keep = [slice(0, length) for length in self.lengths]
            error = sum(float((out[b, :, s] - layer["out"][b, :, s]).pow(2).sum()) for b, s in enumerate(keep))
            norm = sum(float(layer["out"][b, :, s].pow(2).sum()) for b, s in enumerate(keep))
            method.l2.append(math.sqrt(error / norm))
            q, a, b = m.qkv(l, y, n)
            y = m.finish(l, y, m.attend(q, k, v, a, b))
        logits = m.head(y).log_softmax(-1)
        kl = (self.reference.exp() * (self.reference - logits)).sum(-1).clamp_min(0).cpu()
        top = logits.argmax(-1).cpu()
        padded = self.padded.cpu()
        sums = {}
        for b, length in enumerate(self.lengths):
            for i in range(length):
                s = sums.setdefault((b, questions[b][i]), [0.0, 0, 0.0, 0, True])
                s[0] += float(kl[b, i])
                s[1] += 1
                if answers[b][i]:
                    s[2] += float(kl[b, i])
                    s[3] += 1
                    s[4] = s[4] and int(top[b, i]) == int(padded[b, i + 1])
        method.questions += [s for _, s in sorted(sums.items())]


def ratio(x, w):
    """Sum of x over sum of w, with the half width of its 95% interval over questions."""
    if sum(w) <= 0:
        return 0.0, 0.0
    r = sum(x) / sum(w)
    return r, 1.96 * math.sqrt(sum((a - r * b)**2 for a, b in zip(x, w))) / sum(w)


def table(methods, d):
    print("| K + V | bits K, V | KL, all tokens | KL, answers | of the first, all | of the first, answers | "
          "answers right | attention L2 |\n|---|---|---|---|---|---|---|---|")
    base = methods[0].questions
    for m in methods:
        q = m.questions
        col = lambda rows, i: [row[i] for row in rows]
        kl, answer = ratio(col(q, 0), col(q, 1)), ratio(col(q, 2), col(q, 3))
        of, answer_of = ratio(col(q, 0), col(base, 0)), ratio(col(q, 2), col(base, 2))
        asked = [row for row in q if row[3]]
        print(f"| {m.name} | {m.k.stored_bits(d):.2f}, {m.v.stored_bits(d):.2f} | {kl[0]:.5f} ± {kl[1]:.5f} | "
              f"{answer[0]:.5f} ± {answer[1]:.5f} | {of[0]:.3f} ± {of[1]:.3f} | "
              f"{answer_of[0]:.3f} ± {answer_of[1]:.3f} | {sum(row[4] for row in asked)}/{len(asked)} | "
              f"{sum(m.l2) / len(m.l2):.4f} |", flush=True)


def samples(args, tokenizer):
    """(context, tails) of every chunk of the text, or of every row of the suite."""
    if args.suite:
        for line in open(args.suite, encoding="utf-8"):
            row = json.loads(line)
            context = [tokenizer.bos] + tokenizer.encode(row["context"])
            tails = []
            for question in row["questions"]:
                prompt = question.get("template", "Question: {input}\nAnswer:").replace("{input}", question["input"])
                tails.append(tokenizer.encode(prompt) + tokenizer.encode(" " + question["answers"][0]))
            yield context, [t[:200] for t in tails]
        return
    texts = open(args.file, encoding="utf-8").read().split("<|doc|>")
    cut = lambda text: [text[i * len(text) // args.pieces:(i + 1) * len(text) // args.pieces]
                        for i in range(args.pieces)]
    for text in sum(map(cut, texts), []):
        tokens = tokenizer.encode(text)[-(args.length - 1):]
        if len(tokens) < 1024:
            continue
        tokens = [tokenizer.bos] + tokens
        yield tokens[:-args.evaluated], [tokens[-args.evaluated:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-f", "--file")
    parser.add_argument("--suite")
    parser.add_argument("-c", "--length", type=int, default=8192)
    parser.add_argument("--evaluated", type=int, default=400)
    parser.add_argument("--pieces", type=int, default=1, help="cut every document of the text into so many")
    parser.add_argument("--limit", type=int, default=0, help="contexts; 0: all")
    parser.add_argument("--only", default="", help="LAYER:HEAD,... of the KV heads to quantize; default all")
    parser.add_argument("--outliers", type=float, default=1, help="scale every eighth RoPE pair of K by this, and "
                        "its queries by the inverse: the same model with outlier channels")
    parser.add_argument("pairs", nargs="+", metavar="K+V")
    args = parser.parse_args()
    model = Model(args.model)
    model.add_outliers(args.outliers)
    only = {tuple(map(int, pair.split(":"))) for pair in args.only.split(",") if pair}
    study, methods = Study(model, only), [Method(p) for p in args.pairs]
    with torch.no_grad():
        for i, (context, tails) in enumerate(samples(args, model.tokenizer)):
            if args.limit and i == args.limit:
                break
            marks = [mark(model.tokenizer, t) for t in tails]
            questions, answers = [q for q, _ in marks], [a for _, a in marks]
            study.read(context, tails)
            for method in methods:
                study.measure(method, questions, answers)
            print(f"context {i + 1}: {len(context)} tokens, {sum(map(len, tails))} measured", file=sys.stderr)
    table(methods, model.d)


if __name__ == "__main__":
    main()
