class LavinFolderMixin:
    pass
