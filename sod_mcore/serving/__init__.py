"""SGLang serves both models: it generates the student's rollouts and scores them with the teacher.

``python -m sod_mcore.serving CONFIG`` starts the engines (``supervisor``, ``launch``,
``front_door``) and writes their addresses (``fleet``); ``client``, ``scoring`` and ``weights`` talk
to them. ``docs/serving.md`` has the whole.
"""

from sod_mcore.serving.client import EngineClient
from sod_mcore.serving.counters import ClientCounters
from sod_mcore.serving.disk_transfer import DiskTransfer
from sod_mcore.serving.fleet import Endpoints, ModelEndpoints, read_endpoints
from sod_mcore.serving.json_http import EngineError
from sod_mcore.serving.messages import Generation, SamplingSettings
from sod_mcore.serving.replicas import Affinity
from sod_mcore.serving.scoring import Scores, ScoringError, score
from sod_mcore.serving.weight_transfer import WeightTransfer, WeightUpdateError
from sod_mcore.serving.weights import probe_logprobs, update_weights

__all__ = [
    "Affinity",
    "ClientCounters",
    "DiskTransfer",
    "Endpoints",
    "EngineClient",
    "EngineError",
    "Generation",
    "ModelEndpoints",
    "SamplingSettings",
    "Scores",
    "ScoringError",
    "WeightTransfer",
    "WeightUpdateError",
    "probe_logprobs",
    "read_endpoints",
    "score",
    "update_weights",
]
