"""Keys of config.json on which no logit of a causal language model depends.

What is in no table here is read by an architecture or refused.
"""

from __future__ import annotations

from collections.abc import Mapping

# Why no logit depends on them -> keys.
_WRITTEN = {
  "provenance, and the type of the stored numbers, which their files state": """
    _commit_hash _name_or_path architectures dtype model_type torch_dtype transformers_version use_bfloat16
  """,
  "the tokenizer and generation read token ids": """
    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id tokenizer_class
  """,
  "how something is computed and what else a call returns": """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled
    cache_implementation chunk_size_feed_forward output_attentions output_hidden_states return_dict tf_legacy_loss
    torchscript use_cache
  """,
  "products that are computed in parts have the same sum": "pretraining_tp",
  "tables of positions are as long as needed": "max_position_embeddings",
  "initial values, dropout, and other heads than that of a language model": """
    attention_dropout finetuning_task id2label initializer_range label2id problem_type task_specific_params
  """,
  "of pairs of an encoder and a decoder": "cross_attention_hidden_size is_decoder tie_encoder_decoder",
  "generation, for which newer versions have a file of its own": """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
  """,
}
_ADDED = {
  "provenance; code that auto_map names is not run": """
    _model_name_or_path auto_map base_model_name_or_path is_llama_config model_name model_name_or_path name_or_path
    transformers.js_config unsloth_fixed unsloth_optimized unsloth_version
  """,
  "the tokenizer has a file of its own": """
    bos_token cls_token cls_token_id eos_token pad_token padding_side sep_token tokenizer_max_length
    tokenizer_model_max_length tokenizer_name tokenizer_padding_side unk_token unk_token_id
  """,
  "lengths to which inputs were cut in training": """
    max_seq_len max_seq_length max_sequence_length model_max_length seq_length
  """,
  "which kernels compute attention or experts": """
    _experts_implementation attn_implementation experts_implementation use_flash_attention use_flash_attention_2
    use_flash_attn use_memory_efficient_attention use_sdpa
  """,
  "training: dropout, noise, losses, memory, LongLoRA's groups": """
    attention_probs_dropout_prob attn_pdrop classifier_dropout embd_pdrop gradient_checkpointing
    gradient_checkpointing_kwargs group_size_ratio hidden_dropout hidden_dropout_prob layerdrop loss_type
    neftune_noise_alpha num_labels resid_pdrop use_gradient_checkpointing
  """,
  "generation has a file of its own": """
    epsilon_cutoff eta_cutoff guidance_scale max_new_tokens max_time min_new_tokens min_p num_assistant_tokens
    penalty_alpha renormalize_logits sequence_bias stop_strings watermarking_config
  """,
}


def _keys(table: Mapping[str, str]) -> frozenset[str]:
  return frozenset(key for keys in table.values() for key in keys.split())


# What some version of transformers writes by itself: nobody chose it, so that nobody needs to hear of it.
WRITTEN = _keys(_WRITTEN)
# What trainers, converters and people add: they may have meant something by it, and are told that it is not read.
ADDED = _keys(_ADDED)
# Keys that say nothing new with one of these values, and are refused with others.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
  "add_cross_attention": (False,),
  "is_causal": (True,),
  "is_encoder_decoder": (False,),
  "partial_rotary_factor": (1,),
  "pruned_heads": ({}, []),
  "use_bidirectional_attention": (False,),
}
