"""Write a GGUF file again with other weights: F16 or Q8_0 made from the dequantised weights of the original.

usage: python benchmarks/peers/make_gguf.py model.Q4_1.gguf model.F16.gguf model.Q8_0.gguf   (the last part names the type)
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

WRITTEN = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE)  # by the writer


def convert(source: Path, target: Path) -> None:
    """Copy all fields of `source`; store matrices in the type that the name of `target` ends with."""
    kind = gguf.GGMLQuantizationType[target.stem.rpartition(".")[2]]
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name not in WRITTEN and not field.name.startswith("GGUF."):
            of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of_items)
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + kind.name])
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        if weights.ndim == 1:  # norms stay float32, as llama.cpp writes them
            writer.add_tensor(tensor.name, weights.astype(np.float32))
        else:
            writer.add_tensor(tensor.name, gguf.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{target}: {target.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        convert(Path(sys.argv[1]), Path(name))
