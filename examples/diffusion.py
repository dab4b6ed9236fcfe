"""Fine-tune a diffusion model's UNet, and draw with it: python examples/diffusion.py PIPELINE [OUTPUT]

Needs pip install 'pica-peft[diffusion]'. `pica train dreambooth-sd15` does this in full, with pictures from a folder.
"""

import sys

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import get_peft_model

import pica


def main(name: str, output: str = "unet-adapter", steps: str = "10") -> list[float]:
    pipeline = StableDiffusionPipeline.from_pretrained(name)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet = get_peft_model(pipeline.unet, pica.PicaConfig(r=8, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)

    random = torch.Generator().manual_seed(0)
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    latents = torch.randn(1, channels, side, side, generator=random)  # of a picture: pipeline.vae.encode(...)
    noise, time = torch.randn(latents.shape, generator=random), torch.tensor([500])
    noisy = schedule.add_noise(latents, noise, time)
    with torch.no_grad():
        prompt = pipeline.encode_prompt("a photo of sks dog", "cpu", 1, False)[0]
    losses = []
    for _ in range(int(steps)):
        predicted = unet(noisy, time, encoder_hidden_states=prompt).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    pica.save_adapter(unet, output)

    pipeline = StableDiffusionPipeline.from_pretrained(name)
    print("adapted:", *pica.load_into_pipeline(pipeline, output, adapter_name="dog"))
    picture = pipeline("a photo of sks dog", num_inference_steps=2, output_type="pil").images[0]
    picture.save(f"{output}/dog.png")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
