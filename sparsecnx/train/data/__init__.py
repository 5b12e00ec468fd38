"""The images and volumes of a run: which there are, how one is read, the crops, and the processes that read them."""
