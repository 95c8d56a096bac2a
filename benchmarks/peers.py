"""What a user could pick instead: torch.nn, and where they are installed ONNX Runtime, OpenVINO and JAX.

Every contestant computes the same case from the same weights and is asked for what it is good at: torch.nn padded and,
where lengths differ, packed; ONNX Runtime and OpenVINO their own recurrent operators, inputs and outputs bound in
advance; JAX a compiled ``lax.scan`` behind one product for the whole input projection. Weights are put into a
contestant's own layout beforehand, and nothing is copied to or from it while the clock runs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnn_ext.bench import Case, Workload


class Unsupported(Exception):
    """This contestant cannot run this case; says why."""


@dataclass
class Contestant:
    """`run` is what is timed, `results` turns what it returned into named tensors like those of Workload.results."""

    name: str
    run: Callable[[], Any]
    results: Callable[[Any], Mapping[str, Tensor]]


# By our name for them, what holds torch to the same instructions; MKL obeys on Intel's processors alone.
INSTRUCTIONS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}


def held() -> str | None:
    """The instruction set that RNN_EXT_CPU_CAPABILITY holds us to, if it is less than there may be."""
    name = os.environ.get("RNN_EXT_CPU_CAPABILITY")
    return name if name in INSTRUCTIONS else None


@dataclass(frozen=True)
class Peer:
    """`build` raises Unsupported or returns the contestants for a case (torch.nn has two where lengths differ)."""

    name: str
    build: Callable[[Workload, bool, int], list[Contestant]]
    packages: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """One sentence if it is not installed, cannot be imported or would run on other instructions."""
        if self.packages and held():
            return f"{self.name} is left out: it cannot be held to {held()}"
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ModuleNotFoundError as error:
                return f"{self.name} is left out: {error.name} is not installed"
            except Exception as error:
                return f"{self.name} is left out: {package} cannot be imported ({error})".splitlines()[0]
        return None

    def version(self) -> str:
        return importlib.metadata.version(self.packages[-1])


def ours(work: Workload, training: bool, threads: int) -> list[Contestant]:
    return [_torch_like("rnn_ext", work, work.ours(), training)]


def torch_nn(work: Workload, training: bool, threads: int) -> list[Contestant]:
    found = [_torch_like("torch.nn" if work.packed is None else "torch.nn packed", work, work.torch, training)]
    if work.packed is not None:
        # Not the same numbers: states go on through the padding, where a second direction begins. Faster than packed in
        # torch, so that some put up with it; only the first direction's output within the lengths can be checked.
        padded = _torch_like("torch.nn padded", work, work.torch, training, padded=True)
        inside = torch.arange(work.case.length).unsqueeze(1) < torch.tensor(work.case.lengths)
        results = padded.results

        def first_direction(returned: Any) -> dict[str, Tensor]:
            output = results(returned)["output"][..., : work.case.hidden_size]
            return {"first direction": torch.where(inside.unsqueeze(-1), output, 0)}

        found.append(Contestant(padded.name, padded.run, first_direction))
    return found


def _torch_like(name: str, work: Workload, module: Any, training: bool, padded: bool = False) -> Contestant:
    run = work.training(module, padded) if training else work.forward(module, padded)

    def results(returned: Any) -> dict[str, Tensor]:
        found = work.results(module, returned)
        if work.case.lengths is not None:
            found["first direction"] = found["output"][..., : work.case.hidden_size]
        return found

    return Contestant(name, run, results)


def _check_dtype(case: Case) -> None:
    if case.dtype != "float32":
        raise Unsupported("only built for float32")


def _weights(work: Workload) -> list[list[dict[str, np.ndarray]]]:
    """weight_ih, weight_hh, bias_ih and bias_hh of each direction of each layer."""
    state = {name: value.detach().numpy() for name, value in work.torch.state_dict().items()}
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [[{name: state[name + suffix] for name in names} for suffix in layer] for layer in _suffixes(work.case)]


def _suffixes(case: Case) -> list[list[str]]:
    return [[f"_l{k}{end}" for end in ("", "_reverse")[: case.directions]] for k in range(case.num_layers)]


ONNX_GATES = {"rnn": [0], "gru": [1, 0, 2], "lstm": [0, 3, 1, 2]}  # ours: r z n, i f g o; ONNX: z r n, i o f c


def onnx_model(work: Workload) -> bytes:
    """The case as a graph of an RNN, GRU or LSTM operator for each layer: X (L, N, I), lengths if they differ ->
    Y (L, D, N, H)."""
    from onnx import TensorProto, helper, numpy_helper

    case = work.case

    def reordered(weight: np.ndarray) -> np.ndarray:
        gates = weight.reshape(case.gates, case.hidden_size, *weight.shape[1:])
        return gates[ONNX_GATES[case.cell]].reshape(weight.shape)

    inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, [case.length, case.batch, case.input_size])]
    constants = {"merged": np.array([case.length, case.batch, case.directions * case.hidden_size], np.int64)}
    lengths = []
    if case.lengths is not None:
        lengths = ["lengths"]
        constants["lengths"] = np.array(case.lengths, np.int32)
    options: dict[str, Any] = {"linear_before_reset": 1} if case.cell == "gru" else {}
    nodes, input = [], "X"
    for k, weights in enumerate(_weights(work)):
        constants |= {
            f"W{k}": np.stack([reordered(w["weight_ih"]) for w in weights]),
            f"R{k}": np.stack([reordered(w["weight_hh"]) for w in weights]),
            f"B{k}": np.stack([np.concatenate([reordered(w["bias_ih"]), reordered(w["bias_hh"])]) for w in weights]),
        }
        output = "Y" if k == case.num_layers - 1 else f"Y{k}"
        nodes.append(
            helper.make_node(
                case.cell.upper(),
                [input, f"W{k}", f"R{k}", f"B{k}", *lengths],
                [output],
                hidden_size=case.hidden_size,
                direction="bidirectional" if case.bidirectional else "forward",
                **options,
            )
        )
        if output != "Y":  # (L, D, N, H) -> (L, N, D * H)
            nodes.append(helper.make_node("Transpose", [output], [f"T{k}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"T{k}", "merged"], [f"X{k + 1}"]))
            input = f"X{k + 1}"
    shape = [case.length, case.directions, case.batch, case.hidden_size]
    graph = helper.make_graph(
        nodes,
        "layers",
        inputs,
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def _onnx_results(work: Workload, output: np.ndarray) -> dict[str, Tensor]:
    case = work.case
    merged = torch.from_numpy(np.array(output)).movedim(1, 2).reshape(case.length, case.batch, -1)
    return {"output": merged}


def onnx_runtime(work: Workload, training: bool, threads: int) -> list[Contestant]:
    if training:
        raise Unsupported("inference only")
    _check_dtype(work.case)
    run = _onnx_call(work, onnx_model(work), threads)
    return [Contestant("ONNX Runtime", run, lambda returned: _onnx_results(work, returned.numpy()))]


def onnx_runtime_8_bits(work: Workload) -> Contestant:
    """Its dynamic quantization of an LSTM, weights by row, on one thread; it has none of GRUs and RNNs."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"weight_type": QuantType.QInt8, "per_channel": True, "op_types_to_quantize": ["LSTM"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "quantized.onnx")
        logging.disable(logging.WARNING)  # of preparations that such a graph does not need
        try:
            quantize_dynamic(onnx.load_model_from_string(onnx_model(work)), path, **options)
        finally:
            logging.disable(logging.NOTSET)
        run = _onnx_call(work, path.read_bytes(), 1)
    return Contestant("ONNX Runtime, 8 bits", run, lambda returned: _onnx_results(work, returned.numpy()))


def _onnx_call(work: Workload, model: bytes, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    case = work.case
    input = onnxruntime.OrtValue.ortvalue_from_numpy(work.input.numpy())
    shape = [case.length, case.directions, case.batch, case.hidden_size]
    output = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
    binding.bind_ortvalue_input("X", input)
    binding.bind_ortvalue_output("Y", output)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return output

    return run


def openvino(work: Workload, training: bool, threads: int) -> list[Contestant]:
    import openvino as ov

    if training:
        raise Unsupported("inference only")
    _check_dtype(work.case)
    core = ov.Core()
    compiled = core.compile_model(
        core.read_model(model=onnx_model(work), weights=b""),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # the cores have been chosen already
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(work.input.numpy(), shared_memory=True))

    def run() -> Any:
        request.infer()
        return request

    return [
        Contestant("OpenVINO", run, lambda returned: _onnx_results(work, returned.get_output_tensor().data)),
    ]


def set_jax_threads(threads: int) -> None:
    """Before jax is imported for the first time: XLA reads its options only once."""
    if threads == 1:
        options = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {options}".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def jax(work: Workload, training: bool, threads: int) -> list[Contestant]:
    import jax
    import jax.numpy as jnp

    case = work.case
    _check_dtype(case)
    jax.config.update("jax_cpu_enable_async_dispatch", False)

    def step(state: Any, igates: Any, weights: Any) -> Any:
        h = state[0]
        hgates = h @ weights["hh"]
        if case.cell == "rnn":
            return (jnp.tanh(igates + hgates),)
        if case.cell == "gru":
            i_r, i_z, i_n = jnp.split(igates, 3, -1)
            h_r, h_z, h_n = jnp.split(hgates + weights["bias_hh"], 3, -1)
            z = jax.nn.sigmoid(i_z + h_z)
            n = jnp.tanh(i_n + jax.nn.sigmoid(i_r + h_r) * h_n)
            return ((1 - z) * n + z * h,)
        i, f, g, o = jnp.split(igates + hgates, 4, -1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    mask = None
    if case.lengths is not None:
        mask = jnp.asarray(np.arange(case.length)[:, None, None] < np.array(case.lengths)[None, :, None])

    def direction(x: Any, weights: Any, reverse: bool) -> Any:
        igates = x @ weights["ih"] + weights["bias"]

        def body(state: Any, at: Any) -> Any:
            if mask is None:
                new = step(state, at, weights)
                return new, new[0]
            new = tuple(jnp.where(at[1], n, s) for n, s in zip(step(state, at[0], weights), state, strict=True))
            return new, jnp.where(at[1], new[0], 0)

        zeros = jnp.zeros((case.batch, case.hidden_size), x.dtype)
        states = (zeros, zeros) if case.cell == "lstm" else (zeros,)
        return jax.lax.scan(body, states, igates if mask is None else (igates, mask), reverse=reverse)[1]

    def layers(x: Any, weights: Any) -> Any:
        for layer in weights:
            outputs = [direction(x, w, reverse) for w, reverse in zip(layer, (False, True), strict=False)]
            x = jnp.concatenate(outputs, -1)
        return x

    def forward_and_backward(x: Any, weights: Any, grad_output: Any) -> Any:
        output, vjp = jax.vjp(layers, x, weights)
        return output, vjp(grad_output)

    def prepared(w: dict[str, np.ndarray]) -> dict[str, Any]:
        split = case.cell == "gru"
        values = {"ih": w["weight_ih"].T, "hh": w["weight_hh"].T}
        values["bias"] = w["bias_ih"] if split else w["bias_ih"] + w["bias_hh"]
        if split:
            values["bias_hh"] = w["bias_hh"]
        return {name: jnp.asarray(np.ascontiguousarray(value)) for name, value in values.items()}

    x, grad_output = jnp.asarray(work.input.numpy()), jnp.asarray(work.grad_output.numpy())
    weights = [[prepared(w) for w in layer] for layer in _weights(work)]
    compiled = jax.jit(forward_and_backward if training else layers)
    arguments = (x, weights, grad_output) if training else (x, weights)

    def results(returned: Any) -> dict[str, Tensor]:
        found = {"output": _from_jax(returned[0] if training else returned)}
        if training:
            grad_input, grad_weights = returned[1]
            found["input.grad"] = _from_jax(grad_input)
            for layer, suffixes in zip(grad_weights, _suffixes(case), strict=True):
                for grads, suffix in zip(layer, suffixes, strict=True):
                    for name in ("ih", "hh"):
                        found[f"weight_{name}{suffix}.grad"] = _from_jax(grads[name]).T
        return found

    return [Contestant("JAX", lambda: jax.block_until_ready(compiled(*arguments)), results)]


def _from_jax(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


PEERS = [
    Peer("rnn_ext", ours),
    Peer("torch.nn", torch_nn),
    Peer("ONNX Runtime", onnx_runtime, ("onnx", "onnxruntime")),
    Peer("OpenVINO", openvino, ("onnx", "openvino")),
    Peer("JAX", jax, ("jax",)),
]
