"""The maths of the objectives, in torch, with the papers' equations."""
