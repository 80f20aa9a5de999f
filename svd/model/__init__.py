"""The networks: U-Net, autoencoder, conditioning encoders, their weights and LoRA adapters (§2, App. D)."""
