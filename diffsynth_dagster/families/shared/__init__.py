"""What several families have in common.

architecture   settings of a module from the shapes of its tensors
names          tensor names of one layout → of another
fused_names    layers by a model's authors, where one there holds several here
text           prompts → tokens → embeddings
latents        pictures and videos → latents
stages         the stages that several families declare
frames         frames of a video that are given, not predicted
t5             the encoders of T5 and UMT5
qwen_vl        Qwen2.5-VL, which reads prompts with or without pictures
vision_tower   the vision tower of CLIP's ViT-H/14
wan_vae        the VAEs of Wan and Qwen-Image
packing        latents → sequences of tokens, and back
schedule       the sigmas of published samplers
clip           CLIP's text encoders
image_vae      the VAE of the Stable Diffusion models and FLUX.1
unet           the UNet of Stable Diffusion
controlnet     ControlNets for UNets
kohya          LoRAs of UNets and CLIP in kohya's names
diffusion      the noising path and the sampler of the Stable Diffusion models
pipeline       sampling, and loading LoRAs, with the pipelines of diffusers
"""
