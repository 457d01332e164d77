"""What several families have in common.

architecture   a module from its config.json, or from the shapes of its tensors
names          tensor names of one layout → of another
text           prompts → tokens → embeddings
latents        pictures and videos → latents
stages         the stages that several families declare
packing        latents → sequences of tokens, and back
schedule       the sigmas of published samplers
pipeline       sampling, and loading LoRAs, with the pipelines of diffusers
"""
