"""Chat templates of the formats of tool calls, as short as they can be."""

_BODY = (
    "{%% if tools %%}Tools: {%% for tool in tools %%}{{ tool | tojson }}{%% endfor %%} Form: %s\n{%% endif %%}"
    "{%% for m in messages %%}[{{ m.role }}{%% if m.tool_call_id %%} {{ m.tool_call_id }}{%% endif %%}] {{ m.content }}"
    "{%% for call in m.tool_calls or [] %%}{{ call.id }} {{ call.function | tojson }}{%% endfor %%}\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}[assistant]{%% endif %%}"
)
TEMPLATES = {
    "hermes": _BODY % '<tool_call>{"name": ..., "arguments": ...}</tool_call>',
    "llama": _BODY % '<|start_header_id|>{"name": ..., "parameters": ...}',
    "mistral": _BODY % "[TOOL_CALLS] [...]",
    "named": _BODY % "[TOOL_CALLS]name[ARGS]{}",
    "pythonic": _BODY % "[func_name1(params_name1=params_value1, ...), func_name2(params)]",
    "lfm2": _BODY % "<|tool_list_start|>",
    "qwen3_coder": _BODY % "<tool_call><function=name><parameter=key>value</parameter></function></tool_call>",
    "unknown": _BODY % "<tool_call><function=name>",
    "none": "{% for m in messages %}{{ m.content }} tools{% endfor %}",
}
