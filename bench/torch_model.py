"""llama-type GGUF models in PyTorch, float32: weights, tokenizer, layers. For studies, not for speed."""
import math
import re
import struct

import torch
import torch.nn.functional as F

dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


class Gguf:
    def __init__(self, path):
        self.data = open(path, "rb").read()
        self.at = 0
        magic, _, n_tensors, n_keys = self.take("<4sIQQ")
        assert magic == b"GGUF", path
        self.keys = {}
        for _ in range(n_keys):
            key = self.string()
            self.keys[key] = self.value(self.take("<I")[0])
        infos = []
        for _ in range(n_tensors):
            name = self.string()
            dims = self.take("<%dQ" % self.take("<I")[0])
            infos.append((name, dims) + self.take("<IQ"))
        align = self.keys.get("general.alignment", 32)
        base = (self.at + align - 1) // align * align
        self.tensors = {name: self.tensor(dims, kind, base + offset) for name, dims, kind, offset in infos}

    def take(self, fmt):
        out = struct.unpack_from(fmt, self.data, self.at)
        self.at += struct.calcsize(fmt)
        return out

    def string(self):
        n = self.take("<Q")[0]
        self.at += n
        return self.data[self.at - n:self.at].decode("utf-8", "replace")

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            inner, n = self.take("<IQ")
            return [self.value(inner) for _ in range(n)]
        return self.take("<" + {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
                                12: "d"}[kind])[0]

    def tensor(self, dims, kind, at):
        n = math.prod(dims)
        shape = tuple(reversed(dims))
        if kind == 0:
            return torch.frombuffer(bytearray(self.data[at:at + 4 * n]), dtype=torch.float32).reshape(shape).to(dev)
        if kind == 1:
            raw = torch.frombuffer(bytearray(self.data[at:at + 2 * n]), dtype=torch.float16)
            return raw.float().reshape(shape).to(dev)
        assert kind == 8, "weights must be F32, F16 or Q8_0, not GGML type %d" % kind
        raw = torch.frombuffer(bytearray(self.data[at:at + n // 32 * 34]), dtype=torch.uint8).reshape(-1, 34)
        scale = raw[:, :2].contiguous().view(torch.float16).float()
        return (raw[:, 2:].contiguous().view(torch.int8).float() * scale).reshape(shape).to(dev)


class Tokenizer:
    """Byte-level BPE with qwen2's pre-tokenizer."""

    def __init__(self, keys):
        try:
            import regex
            self.words = regex.compile(
                r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        except ImportError:  # the same in terms of the standard library
            letter, digit = r"[^\W\d_]", r"\d"
            self.words = re.compile(
                r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|(?:[^\r\n\w]|_)?" + letter + "+|" + digit +
                r"| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        self.pieces = keys["tokenizer.ggml.tokens"]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(keys["tokenizer.ggml.merges"])}
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        self.char, n = {b: chr(b) for b in plain}, 0
        for b in range(256):
            if b not in self.char:
                self.char[b] = chr(256 + n)
                n += 1
        self.byte = {c: b for b, c in self.char.items()}
        kinds = keys["tokenizer.ggml.token_type"]
        self.special = [p for p, kind in zip(self.pieces, kinds) if kind == 3]
        self.bos = keys["tokenizer.ggml.bos_token_id"]
        self.cache = {}

    def word(self, word):
        if word not in self.cache:
            parts = [self.char[b] for b in word.encode()]
            while len(parts) > 1:
                rank, i = min((self.ranks.get(p, 1 << 30), i) for i, p in enumerate(zip(parts, parts[1:])))
                if rank == 1 << 30:
                    break
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            self.cache[word] = [self.ids[p] for p in parts]
        return self.cache[word]

    def encode(self, text):
        out = []
        for part in re.split("(" + "|".join(map(re.escape, self.special)) + ")", text):
            if part in self.special:
                out.append(self.ids[part])
            else:
                for word in self.words.findall(part):
                    out += self.word(word)
        return out

    def piece(self, token):
        piece = self.pieces[token]
        if piece in self.special:
            return piece
        return bytes(self.byte[c] for c in piece).decode("utf-8", "replace")


class Model:
    def __init__(self, path):
        g = Gguf(path)
        key = lambda name: g.keys["llama." + name]
        self.w, self.tokenizer = g.tensors, Tokenizer(g.keys)
        self.n_layers, self.heads, self.kv_heads = key("block_count"), key("attention.head_count"), key(
            "attention.head_count_kv")
        self.d = g.keys.get("llama.attention.key_length", key("embedding_length") // self.heads)
        self.group, self.eps = self.heads // self.kv_heads, key("attention.layer_norm_rms_epsilon")
        self.freq = key("rope.freq_base")**(-torch.arange(0, self.d, 2, dtype=torch.float64, device=dev) / self.d)

    def add_outliers(self, scale):
        channel = torch.arange(self.d, device=dev)
        factor = torch.where(channel // 2 % 8 == 3, scale, 1.0)
        for l in range(self.n_layers):
            self.w[f"blk.{l}.attn_k.weight"] *= factor.repeat(self.kv_heads)[:, None]
            self.w[f"blk.{l}.attn_q.weight"] /= factor.repeat(self.heads)[:, None]

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.w[name + ".weight"]

    def rope(self, x, first, back=False):  # [..., n, d], neighbouring channels are pairs
        angle = (first + torch.arange(x.shape[-2], device=dev, dtype=torch.float64))[:, None] * self.freq
        cos, sin = angle.cos().float(), angle.sin().float() * (-1 if back else 1)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def qkv(self, l, x, first):  # x [B, n, e]: q [B, heads, n, d], k and v [B, kv_heads, n, d]
        y = self.norm(x, f"blk.{l}.attn_norm")
        q, k, v = ((y @ self.w[f"blk.{l}.attn_{s}.weight"].T).unflatten(-1, (-1, self.d)).transpose(1, 2)
                   for s in "qkv")
        return self.rope(q, first), self.rope(k, first), v

    def finish(self, l, x, attention):  # attention [B, heads, n, d]
        x = x + attention.transpose(1, 2).flatten(-2) @ self.w[f"blk.{l}.attn_output.weight"].T
        y = self.norm(x, f"blk.{l}.ffn_norm")
        gate, up = (y @ self.w[f"blk.{l}.ffn_{s}.weight"].T for s in ("gate", "up"))
        return x + (F.silu(gate) * up) @ self.w[f"blk.{l}.ffn_down.weight"].T

    def head(self, x):
        return self.norm(x, "output_norm") @ self.w.get("output.weight", self.w["token_embd.weight"]).T

    # B tails behind one context: q [B, heads, m, d]; context ck, cv [kv_heads, n, d]; own k, v [B, kv_heads, m, d]
    def attend(self, q, ck, cv, k, v, mask=None):
        B, _, m, d = q.shape
        q = q.unflatten(1, (self.kv_heads, self.group)) / math.sqrt(d)
        past = torch.einsum("bhgmd,hnd->bhgmn", q, ck)
        if mask is not None:
            past = past.masked_fill(~mask[None, :, None, None, :], -math.inf)
        own = torch.einsum("bhgmd,bhnd->bhgmn", q, k)
        own = own.masked_fill(~torch.ones(m, m, dtype=torch.bool, device=dev).tril(), -math.inf)
        p = torch.cat((past, own), -1).softmax(-1)
        n = ck.shape[1]
        out = torch.einsum("bhgmn,hnd->bhgmd", p[..., :n], cv) + torch.einsum("bhgmn,bhnd->bhgmd", p[..., n:], v)
        return out.flatten(1, 2)
