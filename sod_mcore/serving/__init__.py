"""SGLang serves both models: it generates the student's rollouts and scores them with the teacher.

``python -m sod_mcore.serving CONFIG`` starts the engines (``fleet/``) and writes their addresses
(``endpoints.py``); ``client/`` sends them requests, ``weights/`` new weights; ``sleep.py`` lets
them give up their GPUs for a while. ``docs/serving.md`` has the whole.
"""

from sod_mcore.serving.client.counters import ClientCounters
from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.client.messages import Generation, SamplingSettings
from sod_mcore.serving.client.replicas import Affinity
from sod_mcore.serving.client.scoring import Scores, ScoringError, score
from sod_mcore.serving.endpoints import Endpoints, ModelEndpoints, read_endpoints
from sod_mcore.serving.weights.disk_transfer import DiskTransfer
from sod_mcore.serving.weights.transfer import WeightTransfer, WeightUpdateError
from sod_mcore.serving.weights.update import probe_logprobs, update_weights

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
