"""What the frozen base makes of a sample: forward passes alone, no gradients."""
