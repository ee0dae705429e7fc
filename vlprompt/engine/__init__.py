"""Training: the LightningModule, the recipe, callbacks and the Trainer of a run."""
