"""Right and how fast: the reference, the accuracy rule, timing, and what the hardware allows.

The peers to measure beside are in `flashgen.measure.peers`.
"""

from flashgen.measure.accuracy import LSE_TINY, TINY, AccuracyReport, Oracle, accuracy_error
from flashgen.measure.arithmetic import Precision
from flashgen.measure.benchmark import Clock, CudaClock, HostClock, benchmark, host_time_us, quick_time
from flashgen.measure.cache_accuracy import CacheOracle
from flashgen.measure.cases import (
    API_LENGTHS,
    POISON,
    Layout,
    awkward_shapes,
    poisoned_empty,
    poisoned_gradients,
    poisoned_outputs,
    random_inputs,
    random_lse_gradients,
    random_output_gradients,
    sampled_heads,
)
from flashgen.measure.decode_cases import DecodeCall, awkward_decode_shapes, random_decode_call
from flashgen.measure.decode_reference import append_to_cache, decode_reference
from flashgen.measure.extras import random_extras
from flashgen.measure.gradient_accuracy import DELTA_TINY, GradientOracle, gradient_error
from flashgen.measure.gradients import Gradients, gradient_reference
from flashgen.measure.graph_clock import GraphClock, Rotation, rotation_size
from flashgen.measure.outcome import Measurement, Outcome, Rejected, Stage, Timing
from flashgen.measure.pairs import count_visible
from flashgen.measure.philox import dropout_keep
from flashgen.measure.race import Race, run_race
from flashgen.measure.reference import attention_reference
from flashgen.measure.roofline import Floor, Prediction, floor_us, predict_us
from flashgen.spec.rates import tbps, tflops

__all__ = [
    "API_LENGTHS",
    "DELTA_TINY",
    "LSE_TINY",
    "POISON",
    "TINY",
    "AccuracyReport",
    "CacheOracle",
    "Clock",
    "CudaClock",
    "DecodeCall",
    "Floor",
    "GradientOracle",
    "Gradients",
    "GraphClock",
    "HostClock",
    "Layout",
    "Measurement",
    "Oracle",
    "Outcome",
    "Precision",
    "Prediction",
    "Race",
    "Rejected",
    "Rotation",
    "Stage",
    "Timing",
    "accuracy_error",
    "append_to_cache",
    "attention_reference",
    "awkward_decode_shapes",
    "awkward_shapes",
    "benchmark",
    "count_visible",
    "decode_reference",
    "dropout_keep",
    "floor_us",
    "gradient_error",
    "gradient_reference",
    "host_time_us",
    "poisoned_empty",
    "poisoned_gradients",
    "poisoned_outputs",
    "predict_us",
    "quick_time",
    "random_decode_call",
    "random_extras",
    "random_inputs",
    "random_lse_gradients",
    "random_output_gradients",
    "rotation_size",
    "run_race",
    "sampled_heads",
    "tbps",
    "tflops",
]
