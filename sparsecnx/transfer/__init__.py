"""What pretrained networks are worth: probes of their frozen features, fine-tuning, and tests of classifiers."""
