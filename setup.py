"""Builds the optional native library, a plain C ABI without Python or torch headers; metadata is in pyproject.toml.

Without GCC or Clang the package installs all the same, and computes on the CPU in plain PyTorch. At install time the
environment variable BLOBLOSS_FAST_NATIVE makes the library a must (1: fail if it cannot be built) or leaves it out (0).
"""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

WANTED = os.environ.get("BLOBLOSS_FAST_NATIVE", "")
if WANTED not in ("", "0", "1"):
    sys.exit(f"error: BLOBLOSS_FAST_NATIVE must be 1 (a must), 0 (leave out) or not set; got {WANTED!r}")

SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
PER_INSTRUCTION_SET = ("csrc/label_rows.cpp", "csrc/nearest_lines.cpp", "csrc/segment_stats.cpp")
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# Never -ffast-math, which deletes the steps that keep rounding errors small; never -fopenmp: the threads are PyTorch's.
FLAGS = ["-std=c++17", "-O3", "-g0", "-pthread", "-fvisibility=hidden"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


class BuildNative(build_ext):
    """Compiles some sources once per instruction set, and names the library alike for every version of Python."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + SUFFIX

    def build_extension(self, ext):
        path = self.get_ext_fullpath(ext.name)
        Path(path).unlink(missing_ok=True)  # a failure must not leave an old one
        try:
            if self.compiler.compiler_type == "msvc":
                raise CompileError("MSVC does not know its flags")
            objects = self.compile_sources(ext.sources)
            self.compiler.link_shared_object(objects, path, extra_postargs=["-pthread"], target_lang="c++")
        except (CompileError, LinkError) as error:
            why = re.sub(r"\['(.*?)',.*\]'", r"\1'", str(error))  # a command without its arguments
            advice = "; unset BLOBLOSS_FAST_NATIVE to install without it" if WANTED else ""
            raise CompileError(f"the native library needs GCC or Clang and was not built: {why}{advice}") from None

    def compile_sources(self, sources):
        sets = self.instruction_sets()
        has = [(f"BLOBLOSS_HAS_{name.upper()}", None) for name in sets]
        jobs = [(source, "once", has, []) for source in sources if source not in PER_INSTRUCTION_SET]
        for name, flags in sets.items():
            jobs += [(source, name, [("BLOBLOSS_ISA", name)], flags) for source in PER_INSTRUCTION_SET]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [name for names in pool.map(lambda job: self.compile(*job), jobs) for name in names]

    def compile(self, source, folder, macros, flags):
        folder = os.path.join(self.build_temp, folder)
        return self.compiler.compile([source], folder, macros=macros, extra_postargs=[*FLAGS, *flags])

    def instruction_sets(self):
        """Return the flags by name, for those that the compiler and the assembler know."""
        sets = {"baseline": []}
        probe = Path(self.build_temp, "probe.cpp")
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("void probe(float* x) { for (int i = 0; i < 64; ++i) x[i] *= 2; }\n", encoding="utf-8")
        if self.plat_name.endswith(("x86_64", "amd64")) and "arm64" not in os.environ.get("ARCHFLAGS", ""):
            for name, flags in {"avx2": AVX2, "avx512": AVX512}.items():
                try:
                    self.compile(str(probe), name, [], flags)
                    sets[name] = flags
                except CompileError as error:
                    self.warn(f"the native library does without {name}: {error}")
        return sets


class PlatformWheel(bdist_wheel):
    """Tags the wheel by what is in it: a library for one platform and any Python, or Python alone."""

    def run(self):
        self.run_command("build")
        self.skip_build = True
        if not any(map(os.path.exists, self.get_finalized_command("build_ext").get_outputs())):
            self.root_is_pure, self.distribution.ext_modules = True, []
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


library = Extension("blobloss_fast._native", sorted(glob("csrc/*.cpp")), optional=WANTED != "1")
library.depends = glob("csrc/*.h")  # for the sdist
setup(ext_modules=[library] * (WANTED != "0"), cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel})
