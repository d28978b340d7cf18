"""The parameters of each route, from the types of the openai SDK.

Written by tests/llm_stub/write_parameters.py; don't edit it by hand.
"""

SDK_VERSION = "3.54.0"
PARAMETERS: dict[str, frozenset[str]] = {
    "/v1/chat/completions": frozenset(
        """
        audio frequency_penalty function_call functions logit_bias logprobs
        max_completion_tokens max_tokens messages metadata modalities model
        moderation n parallel_tool_calls prediction presence_penalty
        prompt_cache_key prompt_cache_options prompt_cache_retention
        reasoning_effort response_format safety_identifier seed service_tier stop
        store stream stream_options temperature tool_choice tools top_logprobs top_p
        user verbosity web_search_options
        """.split()
    ),
    "/v1/completions": frozenset(
        """
        best_of echo frequency_penalty logit_bias logprobs max_tokens model n
        presence_penalty prompt seed stop stream stream_options suffix temperature
        top_p user
        """.split()
    ),
    "/v1/responses": frozenset(
        """
        access_programs background background_options context_management
        conversation image include input instructions max_output_tokens
        max_tool_calls metadata model moderation parallel_tool_calls
        previous_response_id prompt prompt_cache_key prompt_cache_options
        prompt_cache_retention reasoning safety_identifier service_tier store stream
        stream_options temperature text tool_choice tools top_logprobs top_p
        truncation user
        """.split()
    ),
    "/v1/embeddings": frozenset(
        """
        dimensions encoding_format input model user
        """.split()
    ),
    "/v1/files": frozenset(
        """
        expires_after file purpose
        """.split()
    ),
    "/v1/batches": frozenset(
        """
        completion_window endpoint input_file_id metadata output_expires_after
        """.split()
    ),
}
