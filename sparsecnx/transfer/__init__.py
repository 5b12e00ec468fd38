"""What pretrained networks are worth: probes of their frozen features."""
