"""What of vLLM is relied on, and nothing else, as sources by file."""

SOURCES = {
    "__init__.py": "",
    "platforms.py": """
class Platform:
    @classmethod
    def get_punica_wrapper(cls):
        return "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
current_platform = Platform()
""",
    "lora/__init__.py": "",
    "lora/punica_wrapper/__init__.py": "",
    "lora/punica_wrapper/punica_base.py": """
class PunicaWrapperBase:
    def __init__(self, max_num_batched_tokens, max_batches, device, **kwargs):
        self.updated = None
    def _update_base_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size):
        self.updated = mapping
    def add_lora_fused_moe(self, y):
        return "vLLM's own"
""",
    "entrypoints/__init__.py": "",
    "entrypoints/openai/__init__.py": "",
    "entrypoints/openai/models/__init__.py": "",
    "entrypoints/openai/models/serving.py": """
from itertools import count
from vllm.lora.request import LoRARequest
def create_error_response(message, err_type): return ValueError(message)
class OpenAIServingModels:
    def __init__(self, engine):
        self.engine, self.lora_requests, self.numbers = engine, {}, count(1)
    async def load_lora_adapter(self, request, base_model_name=None):
        lora_name = request.lora_name
        if not lora_name or not request.lora_path: return ValueError("must be provided")
        if lora_name in self.lora_requests and not request.load_inplace: return ValueError("already loaded")
        lora_int_id = (
            self.lora_requests[lora_name].lora_int_id
            if lora_name in self.lora_requests
            else next(self.numbers)
        )
        lora_request = LoRARequest(lora_name, lora_int_id, request.lora_path, load_inplace=request.load_inplace)
        try: await self.engine.add_lora(lora_request)
        except Exception as error: return error
        self.lora_requests[lora_name] = lora_request
        return "Success"
""",
    "entrypoints/serve/__init__.py": "",
    "entrypoints/serve/lora/__init__.py": "",
    "entrypoints/serve/lora/protocol.py": """
from dataclasses import dataclass, replace
@dataclass
class LoadLoRAAdapterRequest:
    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    def model_copy(self, update): return replace(self, **update)
""",
    "lora/request.py": """
from dataclasses import dataclass
@dataclass(eq=False)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    def __eq__(self, value): return self.lora_name == value.lora_name
    def __hash__(self): return hash(self.lora_name)
""",
    "v1/__init__.py": "",
    "v1/core/__init__.py": "",
    "v1/core/kv_cache_utils.py": """
def _gen_lora_extra_hash_keys(request):
    lora_request = request.lora_request
    return [("lora", lora_request.lora_name, lora_request.lora_path)]
""",
}
METHODS = """
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
class {name}(PunicaWrapperBase):
    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs): raise AssertionError
    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs): raise AssertionError
    def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs): ...
    def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs: bool = True, **kwargs): ...
    def add_lora_linear(
        self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs
    ): raise AssertionError
    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs): ...
"""
