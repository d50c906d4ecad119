"""Small configurations of the models of the transformers library, one per architecture."""

from __future__ import annotations

from functools import partial

from benchmarks.zoo import transformers_inputs as make
from benchmarks.zoo import transformers_options as options
from benchmarks.zoo.transformers_inputs import VOCABULARY
from benchmarks.zoo.transformers_options import Entry

ENTRIES: dict[str, Entry] = {
    "albert": Entry(
        "AlbertForMaskedLM", "AlbertConfig", options.bert(embedding_size=16, num_hidden_layers=3), make.text
    ),
    "bart": Entry("BartForConditionalGeneration", "BartConfig", options.bart(), make.pairs),
    "beit": Entry(
        "BeitForImageClassification", "BeitConfig", options.vit(use_relative_position_bias=True), make.image
    ),
    "bert": Entry("BertForMaskedLM", "BertConfig", options.bert(), make.text),
    "bloom": Entry(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        make.whole,  # a row that begins with hidden tokens gives NaN in float64
    ),
    "blip": Entry(
        "BlipForConditionalGeneration",
        "BlipConfig",
        {"projection_dim": 24},
        make.image_and_text,
        (
            (
                "text_config",
                "BlipTextConfig",
                options.bert(encoder_hidden_size=32, bos_token_id=1, eos_token_id=2),
            ),
            ("vision_config", "BlipVisionConfig", options.vit()),
        ),
    ),
    "clip": Entry(
        "CLIPModel",
        "CLIPConfig",
        {"projection_dim": 24},
        make.image_and_text,
        (
            ("text_config", "CLIPTextConfig", options.CLIP_TEXT),
            ("vision_config", "CLIPVisionConfig", options.CLIP_VISION),
        ),
    ),
    "convnext": Entry(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]},
        partial(make.image, 64),
    ),
    "deberta_v2": Entry(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        options.bert(
            relative_attention=True, pos_att_type="p2c|c2p", position_buckets=8, norm_rel_ebd="layer_norm"
        ),
        make.text,
    ),
    "deit": Entry("DeiTForImageClassificationWithTeacher", "DeiTConfig", options.vit(), make.image),
    "detr": Entry(
        "DetrForObjectDetection",
        "DetrConfig",
        options.detr(num_queries=5, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None),
        partial(make.image, 64),
        (("backbone_config", "ResNetConfig", options.resnet(out_features=["stage4"])),),
    ),
    "dinov2": Entry("Dinov2ForImageClassification", "Dinov2Config", options.vit(), make.image),
    "distilbert": Entry(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 40,
        },
        make.text,
    ),
    "electra": Entry("ElectraForMaskedLM", "ElectraConfig", options.bert(embedding_size=16), make.text),
    "falcon": Entry(
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        make.causal,
    ),
    "gemma": Entry("GemmaForCausalLM", "GemmaConfig", options.llama(head_dim=8), make.causal),
    "gemma2": Entry(
        "Gemma2ForCausalLM", "Gemma2Config", options.llama(head_dim=8, sliding_window=8), make.whole
    ),
    "gpt2": Entry(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 40}
        | {"bos_token_id": 1, "eos_token_id": 2},
        make.causal,
    ),
    "gpt_neo": Entry(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 40,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        make.causal,
    ),
    "gpt_neox": Entry("GPTNeoXForCausalLM", "GPTNeoXConfig", options.bert(), make.causal),
    "llama": Entry("LlamaForCausalLM", "LlamaConfig", options.llama(), make.causal),
    "llava": Entry(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"image_token_id": VOCABULARY - 1, "image_seq_length": 16},
        make.llava,
        (
            ("text_config", "LlamaConfig", options.llama()),
            ("vision_config", "CLIPVisionConfig", options.CLIP_VISION),
        ),
    ),
    "mamba": Entry(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 6, "num_hidden_layers": 2},
        make.plain,
    ),
    "mamba2": Entry(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "state_size": 6,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
        make.plain,
    ),
    "marian": Entry(
        "MarianMTModel",
        "MarianConfig",
        options.bart(pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, decoder_vocab_size=VOCABULARY),
        make.pairs,
    ),
    "mask2former": Entry(
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        {
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 48,
            "dim_feedforward": 48,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "num_attention_heads": 4,
            "num_queries": 5,
        },
        partial(make.image, 64),
        (
            (
                "backbone_config",
                "SwinConfig",
                {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [2, 2, 4, 4], "window_size": 4}
                | {"image_size": 64, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
            ),
        ),
    ),
    "maskformer": Entry(
        "MaskFormerForInstanceSegmentation",
        "MaskFormerConfig",
        {"fpn_feature_size": 32, "mask_feature_size": 32},
        partial(make.image, 64),
        (
            (
                "backbone_config",
                "ResNetConfig",
                options.resnet(out_features=["stage1", "stage2", "stage3", "stage4"]),
            ),
            ("decoder_config", "DetrConfig", options.detr(num_queries=5)),
        ),
    ),
    "mistral": Entry("MistralForCausalLM", "MistralConfig", options.llama(sliding_window=6), make.causal),
    "mixtral": Entry(
        "MixtralForCausalLM",
        "MixtralConfig",
        options.llama(num_local_experts=4, num_experts_per_tok=2),
        make.causal,
    ),
    "mobilebert": Entry(
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        options.bert(
            embedding_size=24, true_hidden_size=16, intra_bottleneck_size=16, num_feedforward_networks=2
        ),
        make.text,
    ),
    "opt": Entry(
        "OPTForCausalLM",
        "OPTConfig",
        options.bert(ffn_dim=48, word_embed_proj_dim=24, bos_token_id=1, eos_token_id=2),
        make.causal,
    ),
    "phi": Entry("PhiForCausalLM", "PhiConfig", options.bert(bos_token_id=1, eos_token_id=2), make.causal),
    "phi3": Entry("Phi3ForCausalLM", "Phi3Config", options.llama(), make.causal),
    "qwen2": Entry("Qwen2ForCausalLM", "Qwen2Config", options.llama(), make.causal),
    "qwen2_moe": Entry(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        options.llama(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        | {"shared_expert_intermediate_size": 40},
        make.causal,
    ),
    "qwen3": Entry("Qwen3ForCausalLM", "Qwen3Config", options.llama(head_dim=8), make.causal),
    "roberta": Entry("RobertaForMaskedLM", "RobertaConfig", options.bert(), make.text),
    "rwkv": Entry("RwkvForCausalLM", "RwkvConfig", options.rwkv(), make.plain),
    "sam": Entry(
        "SamModel",
        "SamConfig",
        {},
        make.sam,
        (
            (
                "vision_config",
                "SamVisionConfig",
                {
                    "hidden_size": 32,
                    "output_channels": 24,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "image_size": 64,
                    "patch_size": 8,
                    "mlp_dim": 48,
                    "num_pos_feats": 12,
                    "window_size": 3,
                    "global_attn_indexes": [1],
                },
            ),
            (
                "prompt_encoder_config",
                "SamPromptEncoderConfig",
                {"hidden_size": 24, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
            ),
            (
                "mask_decoder_config",
                "SamMaskDecoderConfig",
                {"hidden_size": 24, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": 24},
            ),
        ),
    ),
    "segformer": Entry(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
        | {"decoder_hidden_size": 24, "num_labels": 7},
        partial(make.image, 64),
    ),
    "siglip": Entry(
        "SiglipModel",
        "SiglipConfig",
        {},
        make.image_and_text,
        (
            ("text_config", "SiglipTextConfig", options.bert(projection_size=32, pad_token_id=0)),
            ("vision_config", "SiglipVisionConfig", options.vit()),
        ),
    ),
    "swin": Entry(
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
        | {"patch_size": 4},
        partial(make.image, 64),
    ),
    "t5": Entry(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        make.pairs,
    ),
    "timesformer": Entry(
        "TimesformerForVideoClassification", "TimesformerConfig", options.vit(num_frames=3), make.video
    ),
    "vit": Entry("ViTForImageClassification", "ViTConfig", options.vit(), make.image),
    "vit_mae": Entry(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        options.vit(
            decoder_num_attention_heads=4,
            decoder_hidden_size=24,
            decoder_num_hidden_layers=2,
            decoder_intermediate_size=40,
        ),
        make.masked_image,
    ),
    "wav2vec2": Entry(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        options.bert(
            conv_dim=(16, 24, 32),
            conv_stride=(5, 4, 2),
            conv_kernel=(10, 4, 3),
            num_feat_extract_layers=3,
            num_conv_pos_embeddings=6,
            num_conv_pos_embedding_groups=4,
            layerdrop=0.1,
        ),
        make.wave,
    ),
    "whisper": Entry(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        options.bart(
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=30,
            decoder_start_token_id=3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            begin_suppress_tokens=None,
        ),
        make.whisper,
    ),
}
