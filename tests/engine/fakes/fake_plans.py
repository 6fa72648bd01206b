"""Plans that `fake_tensorrt` reads: a header as the real ones have, and which ONNX graph it stands for."""

import dataclasses
import json
import re
import shutil

from bertrt.backends.parts import parts_of
from bertrt.folder import EngineFolder, record_files
from bertrt.plans import Plan, Profile
from bertrt_export.plans.profiles import input_ranges, mlm_rows

VERSIONS = {"tensorrt": "11.1.0.106", "tensorrt_rtx": "1.7.1.116"}
_TAGS = {"tensorrt": b"ftrt", "tensorrt_rtx": b"vtrt"}
HEADER = 64


def make_plan(graph, profiles, *, library="tensorrt", scratch=4096):
    """The bytes of a plan of an ONNX graph.

    Args:
        graph: the path of the graph.
        profiles: for each profile the least, best and most shape of each input.
        library: that builds it.
        scratch: bytes that a context of the first profile needs; of the second twice as many, and so on.
    """
    numbers = bytes(int(number) & 0xFF for number in re.findall(r"\d+", VERSIONS[library])[:4])
    header = (_TAGS[library].ljust(24, b"\0") + numbers).ljust(HEADER, b"\0")
    return header + json.dumps({"graph": str(graph), "profiles": profiles, "scratch": scratch}).encode()


def build_plans(source, out, profiles, *, library="tensorrt", most_mlm_rows=1024):
    """Copy an engine in parts, with plans; the folder.

    Args:
        source: an engine that was exported for TensorRT.
        out: where it goes.
        profiles: of the encoder, as text.
        library: that builds the plans.
        most_mlm_rows: of one run of the masked-LM head.
    """
    folder = EngineFolder.open(shutil.copytree(source, out))
    manifest = folder.manifest
    parsed = [Profile.parse(profile) for profile in profiles]
    rows = min(most_mlm_rows, mlm_rows(parsed, manifest.heads))
    for part in parts_of(manifest.heads):
        ranges = [
            {
                name: [list(getattr(range_, which)) for which in ("least", "best", "most")]
                for name, range_ in one.items()
            }
            for one in input_ranges(part, parsed, manifest.architecture)
        ]
        for name in ("mlm_positions", "mlm_candidates") if part == "mlm" else ():
            ranges[0][name] = [[min(rows, shape[0]), *shape[1:]] for shape in ranges[0][name]]
        (folder.path / f"{part}.plan").write_bytes(
            make_plan(folder.path / f"{part}.onnx", ranges, library=library)
        )
    plan = Plan(
        library=library,
        version=VERSIONS[library],
        compute_capabilities=("8.9",),
        profiles=tuple(parsed),
        mlm_rows=rows,
    )
    files = record_files(folder.path)
    backends = {**manifest.backends, "tensorrt": {part: f"{part}.plan" for part in parts_of(manifest.heads)}}
    return folder.replace_manifest(dataclasses.replace(manifest, plan=plan, files=files, backends=backends))
