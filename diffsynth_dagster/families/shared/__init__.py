"""Code that several families share.

architecture   settings of a module from the shapes of its tensors
names          renaming of tensors by prefix
fused_names    layer names of a model's authors, whose layers may fuse several of ours
text           prompts → tokens → embeddings
latents        pictures and videos → latents, and back
stages         the stages that several families declare
chunks         long captions for CLIP, in chunks of 75 tokens
frames         frames of a video that are given, not predicted
t5             the encoders of T5 and UMT5
gemma          Gemma 3 as a text encoder
qwen_vl        Qwen2.5-VL as a text encoder, with or without pictures
ltx_text       LTX-2's prompts: Gemma 3 and the connectors
ltx_vae        LTX-2's VAEs of video and sound, and its vocoder
vision_tower   the vision tower of CLIP's ViT-H/14
wan_vae        the VAEs of Wan and Qwen-Image
packing        latents → sequences of tokens, and back
schedule       the sigmas of published flow-matching samplers
clip           CLIP's text encoders
image_vae      the VAE of the Stable Diffusion models and FLUX.1
unet           the UNet of Stable Diffusion
controlnet     ControlNets for UNets
kohya          LoRAs of UNets and CLIP under kohya's names
diffusion      the noising path and the sampler of the Stable Diffusion models
pipeline       loading LoRAs like diffusers' pipelines
"""
