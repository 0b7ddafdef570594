"""The operators as torch sees them."""

from lorakernels.ops.experts import combine_experts as combine_experts
from lorakernels.ops.experts import expert_lora_linear as expert_lora_linear
from lorakernels.ops.experts import expert_route as expert_route
from lorakernels.ops.experts import frozen_experts as frozen_experts
from lorakernels.ops.flops import register_flop_formulas
from lorakernels.ops.linear import frozen_linear as frozen_linear
from lorakernels.ops.linear import is_small as is_small
from lorakernels.ops.linear import lora_linear as lora_linear
from lorakernels.ops.linear import lora_linear_group as lora_linear_group
from lorakernels.ops.linear import small_lora_linear as small_lora_linear
from lorakernels.ops.linear_operators import autocast_arguments as autocast_arguments
from lorakernels.ops.multi_embedding import multi_lora_embedding as multi_lora_embedding
from lorakernels.ops.multi_experts import multi_expert_lora_linear as multi_expert_lora_linear
from lorakernels.ops.multi_experts import route_adapters as route_adapters
from lorakernels.ops.multi_linear import bound_update as bound_update
from lorakernels.ops.multi_linear import bound_updates as bound_updates
from lorakernels.ops.multi_linear import multi_lora_linear as multi_lora_linear
from lorakernels.ops.multi_shrink_expand import multi_lora_add as multi_lora_add
from lorakernels.ops.multi_shrink_expand import multi_lora_expand as multi_lora_expand
from lorakernels.ops.multi_shrink_expand import multi_lora_shrink as multi_lora_shrink
from lorakernels.ops.operator import adds_bias_apart as adds_bias_apart
from lorakernels.ops.operator import as_matrix as as_matrix
from lorakernels.ops.operator import as_output as as_output
from lorakernels.ops.operator import linear_to_edit as linear_to_edit
from lorakernels.ops.operator import runs_directly as runs_directly
from lorakernels.ops.sharding import register_shardings
from lorakernels.ops.weight_norm import lora_weight_norm as lora_weight_norm
from lorakernels.ops.weight_norm import row_norm as row_norm

register_flop_formulas()
register_shardings()
