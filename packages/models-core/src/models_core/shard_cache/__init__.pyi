from .cache import ShardCache

__all__ = ["ShardCache"]
