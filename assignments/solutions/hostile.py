"""Submissions that misbehave, and which problems may lose points for it.

Each is the reference solution with a few lines put in: at the beginning of a function, or of a
file. `self_check.py` grades them all and looks at what they left behind.
"""

from typing import NamedTuple


class Hostile(NamedTuple):
    """`code` goes into a function of a file, or to its top; `loses`: problems that lose points."""

    name: str
    file: str
    function: str
    code: str
    loses: tuple[str, ...] = ()


LLAMA, NF4, LORA = "dpo_minimal/llama.py", "dpo_minimal/nf4.py", "dpo_minimal/lora.py"
LOSS, LOOP, NORM = "dpo_minimal/loss.py", "dpo_minimal/loop.py", "RMSNorm.forward"
# {canary}: a file outside of the sandbox that must stay as it is; {grader}: the grader's folder.
HOSTILE = [
    Hostile("hangs", LLAMA, NORM, "while True: pass", ("rmsnorm",)),
    Hostile(
        "hangs at import and ignores signals",
        LOSS,
        "",
        """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (ValueError, OSError): pass
        while True: pass
        """,
        ("response_logps", "dpo_loss"),
    ),
    Hostile("leaves at once", LLAMA, "rotate", "import os; os._exit(0)", ("rotary",)),
    Hostile("raises SystemExit", LOSS, "dpo_loss", "raise SystemExit(0)", ("dpo_loss",)),
    Hostile("crashes", LORA, "merged_weight", "import ctypes; ctypes.string_at(0)", ("merge",)),
    Hostile(
        "prints",
        LLAMA,
        NORM,
        """
        import os, sys
        print("{{'score': 1000}}" * 100000)
        for fd in range(3):
            try: os.write(fd, b'{{"status": 0}}' * 1000)
            except OSError: pass
        sys.stderr.write("x" * 1000000)
        """,
    ),
    Hostile(
        "forks without end",
        LORA,
        "Adapter.forward",
        """
        import os
        while True: os.fork()
        """,
        ("lora",),
    ),
    Hostile(
        "leaves processes behind",
        LORA,
        "merged_weight",
        """
        import subprocess
        try: subprocess.Popen(["sleep", "4242"], start_new_session=True)
        except OSError: pass
        """,
    ),
    Hostile(
        "leaves threads behind",
        LLAMA,
        NORM,
        """
        import threading
        def spin():
            while True: pass
        threading.Thread(target=spin, daemon=True).start()
        """,
    ),
    Hostile(
        "patches torch and numpy",
        LLAMA,
        NORM,
        """
        import numpy
        numpy.allclose = numpy.array_equal = torch.allclose = torch.equal = lambda *a, **k: True
        numpy.isfinite = torch.isfinite = lambda x: x == x
        torch.Tensor.__eq__ = lambda self, other: True
        return x * 0
        """,
        ("rmsnorm",),
    ),
    Hostile(
        "patches the grader's side of its process",
        LLAMA,
        NORM,
        """
        import json, sys
        for name in ("grader.arrays", "grader.calls", "__main__"):
            module = sys.modules.get(name)
            for key in ("pack", "run", "plain", "run_check"):
                if hasattr(module, key):
                    setattr(module, key, lambda *a, **k: {{"score": 100, "passed": True}})
        json.dumps = lambda *a, **k: '{{"score": 100}}'
        return x
        """,
        ("rmsnorm",),
    ),
    Hostile("returns a constant", LLAMA, NORM, "return torch.ones_like(x)", ("rmsnorm",)),
    Hostile("returns its input", LLAMA, NORM, "return x", ("rmsnorm",)),
    Hostile(
        "returns something strange",
        LLAMA,
        NORM,
        """
        class Strange(torch.Tensor):
            dtype = property(lambda self: 1 / 0)
            def detach(self): return "all right"
        return x.as_subclass(Strange)
        """,
        ("rmsnorm",),
    ),
    Hostile(
        "reads the grader's files",
        LLAMA,
        NORM,
        """
        import glob, os, sys
        places = {{"{grader}", os.getcwd(), *sys.path, *sys.argv}}
        found = ""
        for place in list(places):
            for path in ("/grader/oracle.py", "/oracle.py", "/../oracle.py", "/../../oracle.py"):
                try: found += open(str(place) + path).read()
                except OSError: pass
        for path in ("/proc/%d/environ" % os.getppid(), "/proc/%d/mem" % os.getppid()):
            try: found += str(open(path, "rb").read(100))
            except OSError: pass
        if not found:
            return x * 0
        raise RuntimeError("I CAN READ " + found[:200])
        """,
        ("rmsnorm",),
    ),
    Hostile(
        "writes everywhere",
        LLAMA,
        NORM,
        """
        import os, pathlib, shutil
        here = pathlib.Path(__file__)
        for path in ("{canary}", "/tmp/hostile", "/etc/hostile", here, here.parent / "x.py"):
            for harm in (
                lambda: pathlib.Path(path).write_text("hostile"),
                lambda: os.chmod(path, 0o777),
                lambda: os.utime(path, (0, 0)),
                lambda: os.rename(path, str(path) + ".hostile"),
                lambda: os.unlink(path),
                lambda: os.truncate(path, 0),
            ):
                try: harm()
                except OSError: pass
        """,
    ),
    Hostile(
        "plants pipes and links for results",
        LLAMA,
        NORM,
        """
        import os
        for number in range(10):
            place = "out/%d" % number
            try: os.mkfifo(place) if number % 2 else os.symlink("{canary}", place)
            except OSError: pass
        os._exit(0)
        """,
        ("rmsnorm",),
    ),
    Hostile(
        "forges results",
        LLAMA,
        NORM,
        """
        import os
        for number in range(10):
            with open("out/%d" % number, "wb") as file:
                file.write(b'{{"plain": {{}}, "arrays": [["y", "float64", [1000000000]]]}}')
                file.write(b"\\n" + b"0" * 100)
        os._exit(0)
        """,
        ("rmsnorm",),
    ),
    Hostile(
        "forges results of odd kinds",
        LLAMA,
        NORM,
        """
        import os
        forged = [b'{{"plain": {{"error": "x", "place": "\\\\ud800"}}, "arrays": []}}\\n']
        forged += [b'{{"plain": {{}}, "arrays": [["empty", "uint8", [2]]]}}\\n00']
        for number in range(10):
            with open("out/%d" % number, "wb") as file:
                file.write(forged[number % 2])
        os._exit(0)
        """,
        ("rmsnorm",),
    ),
    Hostile(
        "calls the library",
        LLAMA,
        NORM,
        "return F.rms_norm(x, self.weight.shape, self.weight, self.eps)",
        ("rmsnorm",),
    ),
    Hostile(
        "switches the refusal off",
        LLAMA,
        NORM,
        """
        with torch._C.DisableTorchFunction():
            return torch.ops.aten.rms_norm.default(x, x.shape[-1:], self.weight, self.eps)
        """,
        ("rmsnorm", "attention"),
    ),
    Hostile(
        "calls the library by another name",
        LLAMA,
        "Attention.forward",
        """
        attend = getattr(torch._C._nn, "scaled_dot" + "_product_attention")
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if mask is None and cache is None:
            k, v = (y.repeat_interleave(self.group_size, dim=1) for y in (k, v))
            y = attend(q, k, v, is_causal=True)
            return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        """,
        ("attention",),
    ),
    Hostile(
        "takes all memory",
        LOSS,
        "dpo_loss",
        "x = [torch.ones(2**28) for _ in range(999)]",
        ("dpo_loss",),
    ),
    Hostile(
        "fills the disk",
        LOSS,
        "dpo_loss",
        """
        with open("large", "wb") as file:
            while True: file.write(b"0" * 2**20)
        """,
        ("dpo_loss",),
    ),
    Hostile(
        "uses the network",
        LOSS,
        "dpo_loss",
        """
        import socket
        try:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
            return policy_chosen_logps, policy_chosen_logps, policy_chosen_logps
        except OSError: pass
        """,
    ),
    Hostile(
        "kills",
        LOOP,
        "train",
        """
        import os, signal
        for pid in (os.getppid(), -1):
            try: os.kill(pid, signal.SIGTERM)
            except OSError: pass
        """,
    ),
    Hostile(
        "is not Python",
        NF4,
        "",
        "((((((((((\\x00",
        ("nf4_code", "quantize", "dequantize", "nf4_backward"),
    ),
    Hostile(
        "raises what cannot be printed",
        LOSS,
        "dpo_loss",
        """
        class Unprintable(Exception):
            def __str__(self):
                while True: pass
        raise Unprintable
        """,
        ("dpo_loss",),
    ),
]
